"""The tasks of an alignment: each one's fine-tune as a module, its inputs and its head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dirmerge.alignment.data import MissingPackageError, make_batches, read_inputs, task_seed
from dirmerge.alignment.features import Pooled, classifier, last_linear
from dirmerge.alignment.heads import as_head, read_head
from dirmerge.alignment.model import AlignmentTask, Model, batch_on, device_of
from dirmerge.checkpoints.adapters import is_adapter, open_adapter
from dirmerge.checkpoints.hub import resolve
from dirmerge.checkpoints.safetensors_reader import read_tensor
from dirmerge.engine.compute import CPU
from dirmerge.errors import CheckpointError, MismatchError, RecipeError
from dirmerge.recipe import Recipe
from dirmerge.recipe.align import AlignSection, AlignTask


@dataclass
class TaskSource:
    """One task: its fine-tune, its unlabelled inputs, and how its module is made.

    Attributes:
        section: the task's entry in the recipe.
        t: number of the fine-tune, from 0.
        folder: folder of configuration and tokenizer: the fine-tune's, or the base's for an adapter.
        adapter: the adapter's folder, None for a full model.
        inputs: texts or images.
        images: whether the inputs are images.
    """

    section: AlignTask
    t: int
    folder: Path
    adapter: Path | None
    inputs: list[Any]
    images: bool

    @property
    def name(self) -> str:
        """The task's name."""
        return self.section.name

    @property
    def reads(self) -> str:
        """What the features are, for the head's JSON."""
        return "input of the last linear layer" if self.section.head is None else self.section.features

    def module(self, device: torch.device = CPU, *, empty: bool = False) -> torch.nn.Module:
        """Makes the float32 module with the fine-tune's weights; an adapter's has the base's.

        Args:
            device: where the module is.
            empty: whether the module is made without weights.
        """
        transformers = import_transformers()
        kind = "AutoModel"
        if self.section.head is None:
            kind = "AutoModelForImageClassification" if self.images else "AutoModelForSequenceClassification"
        saved = {} if self.adapter is None else open_adapter(self.adapter).saved
        options: dict[str, Any] = {}
        if self.adapter is not None and self.section.head is None:
            rows = [info.shape[0] for info in saved.values() if len(info.shape) == 2]
            if not rows:
                raise RecipeError(
                    f"{self.adapter}: holds no classifier (modules_to_save); give task {self.name} a `head`"
                )
            options["num_labels"] = rows[-1]
        try:
            config = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True, **options)
            auto = getattr(transformers, kind)
            if empty:
                with torch.device("meta"):
                    built: torch.nn.Module = auto.from_config(config)
                return built
            module: torch.nn.Module = auto.from_pretrained(
                self.folder, config=config, local_files_only=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            cause = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{self.folder}: transformers cannot load it as {kind}: {cause}") from error
        own = dict(module.named_parameters())
        for name, info in saved.items():
            if name in own and own[name].shape == info.shape:
                with torch.no_grad():
                    own[name].copy_(read_tensor(info))
        return module.eval().to(device)

    def task(self, module: torch.nn.Module, section: AlignSection) -> AlignmentTask:
        """Returns the task's batches, reader and head, all on the CPU."""
        batches = make_batches(self.inputs, self.images, self.folder, section.batch_size, section.max_length)
        if self.section.head is None:
            reader, own = classifier(module)
            task = AlignmentTask(self.name, batches, own.on(CPU), reader)
            self._check(module, task)
            return task
        stored = read_head(self.section.head)
        if stored.head is None:
            raise CheckpointError(f"{self.section.head}: holds a map alone, and a head is needed")
        return AlignmentTask(self.name, batches, stored.head, Pooled(self.section.features))

    @torch.no_grad()
    def _check(self, module: torch.nn.Module, task: AlignmentTask) -> None:
        """Checks that the head on the features gives the model's logits: not all classifiers are linear."""
        batch = batch_on(task.batch_list()[0], device_of(Model(module)))
        expected = Model(module).run(batch).logits
        found = as_head(task.head)(task.features(Model(module), batch))
        if found.shape != expected.shape or float((found - expected).norm()) > 1e-3 * float(expected.norm()):
            raise MismatchError(
                f"task {self.name}: the logits of {type(module).__name__} are not a linear layer of its last "
                "features, so no map folds into it; use the Python API with features and a head of your own"
            )

    def names(self, module: torch.nn.Module, known: Iterable[str]) -> dict[str, str]:
        """Returns the module's name of every known tensor of the merge that it holds.

        Raises:
            MismatchError: the features need a weight that the merge does not have.
        """
        own = [name for name, _ in module.named_parameters()]
        if self.section.head is None:
            path = last_linear(module)
            own = [name for name in own if not name.startswith(f"{path}.")]
        elif self.section.features in ("mean", "cls"):
            own = [name for name in own if not name.startswith("pooler.")]
        prefix = f"{getattr(module, 'base_model_prefix', '')}."
        names = set(known)
        # encoder.… and bert.encoder.… are the same tensor, whichever of the two has the prefix.
        readings = [
            {name: name for name in own},
            {name.removeprefix(prefix): name for name in own},
            {prefix + name: name for name in own},
        ]
        found = max(readings, key=lambda reading: len(reading.keys() & names))
        missing = sorted(found.keys() - names)
        if missing:
            raise MismatchError(
                f"task {self.name}: its features need {missing[0]}"
                + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
                + ", which the merge lacks; give them a rule `mean` or `merge` under `tensors:`"
            )
        return found


def open_sources(recipe: Recipe, section: AlignSection) -> list[TaskSource]:
    """Reads the inputs of every task in the section and finds its fine-tune.

    Raises:
        RecipeError: the base or a model is no folder, or the data lacks the column.
        CheckpointError: a model or data file that cannot be read.
    """
    if recipe.base is None or not isinstance(recipe.base.source, str):
        raise RecipeError(f"{recipe.origin}: align: needs a base_model in a folder")
    base = resolve(recipe.base.source)
    entries = recipe.tasks()
    labels = [entry.model.label for entry in entries]
    found = []
    for i, task in enumerate(section.tasks):
        t = section.index(i, labels)
        assert t is not None  # checked with the recipe
        reference = entries[t].model
        if not isinstance(reference.source, str):
            raise RecipeError(f"{recipe.origin}: align: needs models in folders, got {reference.label}")
        folder, adapter = resolve(reference.source), None
        if reference.adapter is not None:
            adapter = resolve(reference.adapter)
        elif is_adapter(folder):
            folder, adapter = base, folder
        seed = task_seed(task.name, recipe.seed)
        inputs, images = read_inputs(task.data, task.column, section.inputs, seed)
        found.append(TaskSource(task, t, folder, adapter, inputs, images))
    return found


def import_transformers() -> Any:
    """Returns the package transformers, its progress bars switched off.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"models are run by the package {error.name}, which is missing: pip install 'dirmerge[align]'"
        ) from error
    hub: Any = transformers.utils.logging
    hub.disable_progress_bar()
    return transformers
