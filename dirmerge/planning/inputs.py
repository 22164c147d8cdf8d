"""The live inputs of a merge: opened checkpoints and adapters, with the base's name of every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from dirmerge.checkpoints.adapters import Adapter, is_adapter, open_adapter
from dirmerge.checkpoints.hub import resolve
from dirmerge.checkpoints.reader import Checkpoint, open_checkpoint
from dirmerge.checkpoints.safetensors_reader import TensorInfo
from dirmerge.errors import MismatchError, RecipeError
from dirmerge.planning.names import common_prefix
from dirmerge.recipe import ModelRef, Recipe

Kind = Literal["model", "adapter", "model + adapter", "state dict"]


@dataclass(frozen=True)
class Place:
    """Where an input is, once hub ids are resolved.

    Attributes:
        label: as the recipe names it.
        kind: what it is.
        checkpoint: path of its full weights; None for an adapter on the base, and for a state dict.
        adapter: path of its adapter, if it has one.
    """

    label: str
    kind: Kind
    checkpoint: str | None = None
    adapter: str | None = None


@dataclass
class Input:
    """One opened input.

    Attributes:
        place: where it is.
        checkpoint: its full weights, None for an adapter on the base itself.
        adapter: its adapter, if it has one.
        tensors: base tensor name → name in the checkpoint.
        modules: base tensor name → adapted module.
        saved: base tensor name → name of the full tensor in the adapter.
        tied: name in the checkpoint → name of the tensor that it equals.
    """

    place: Place
    checkpoint: Checkpoint | None = None
    adapter: Adapter | None = None
    tensors: dict[str, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """As the recipe names it."""
        return self.place.label

    @property
    def adapter_only(self) -> bool:
        """Whether it is an adapter without weights of its own."""
        return self.checkpoint is None and self.adapter is not None

    @property
    def files(self) -> list[Path]:
        """The weight files it is read from."""
        files = list(self.checkpoint.files) if self.checkpoint is not None else []
        return files + (list(self.adapter.files) if self.adapter is not None else [])

    @property
    def folder(self) -> Path | None:
        """The folder of its configuration and tokenizer; None for a state dict."""
        path = self.checkpoint.path if self.checkpoint is not None else None
        if path is None and self.adapter is not None:
            path = self.adapter.path
        return path if path is None or path.is_dir() else path.parent

    def infos(self) -> list[TensorInfo]:
        """Returns the headers of all its tensors, file by file."""
        infos = list(self.checkpoint.tensors.values()) if self.checkpoint is not None else []
        if self.adapter is not None:
            infos += [info for target in self.adapter.targets.values() for info in (target.a, target.b)]
            infos += [*self.adapter.saved.values(), *self.adapter.base_copies.values()]
        return infos


@dataclass
class Inputs:
    """The opened inputs of one merge; leaving it closes them.

    Attributes:
        base: the base model; None for an adapter made from adapters alone.
        tasks: the fine-tunes in the recipe's order.
        notes: how names were matched.
    """

    base: Input | None
    tasks: list[Input]
    notes: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[Input]:
        """All inputs, the base first."""
        return [*([self.base] if self.base is not None else []), *self.tasks]

    @property
    def base_tensors(self) -> Mapping[str, TensorInfo]:
        """The base's headers by name."""
        checkpoint = self.base.checkpoint if self.base is not None else None
        return checkpoint.tensors if checkpoint is not None else {}

    def __enter__(self) -> Inputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes all inputs."""
        for item in self.all:
            if item.checkpoint is not None:
                item.checkpoint.close()

    def match_names(self) -> None:
        """Finds, for every input, the base's names of its tensors.

        Raises:
            MismatchError: an adapter's factors that fit the base in neither orientation; lists all.
        """
        if self.base is not None and self.base.checkpoint is not None:
            self.base.tensors = {name: name for name in self.base_tensors}
            self.base.tied = _tied_names(self.base.checkpoint)
            for names in self.base.checkpoint.tied:
                self.notes.append(f"base: {', '.join(names)} are tied: one tensor, written once")
        problems: list[str] = []
        for task in self.tasks:
            if task.checkpoint is not None:
                self._match_checkpoint(task, task.checkpoint)
            if task.adapter is not None:
                try:
                    self._match_adapter(task, task.adapter)
                except MismatchError as error:
                    problems.append(str(error))
        if problems:
            raise MismatchError("\n  ".join(problems))

    def _match_checkpoint(self, task: Input, checkpoint: Checkpoint) -> None:
        own, base_names = checkpoint.tensors.keys(), self.base_tensors.keys()
        strip, add = "", ""
        if base_names and not any(name in base_names for name in own):
            # All of the base is inside the fine-tune (bert.encoder… for encoder…), or the other way round.
            inside = common_prefix(base_names, own)
            outside = common_prefix(own, base_names)
            if inside is not None:
                add, strip = inside  # base name = add + own name without strip
            elif outside is not None:
                strip, add = outside
            if strip or add:
                self.notes.append(
                    f"{task.label}: {_prefix_note(strip, add)} its tensors' names to match the base's"
                )
        task.tensors = {add + name[len(strip) :] if name.startswith(strip) else name: name for name in own}
        task.tied = _tied_names(checkpoint)

    def _match_adapter(self, task: Input, adapter: Adapter) -> None:
        weights = {target.name: module for module, target in adapter.targets.items()}
        prefix: tuple[str, str] | None = ("", "")
        if self.base_tensors:
            prefix = common_prefix(weights.keys(), self.base_tensors.keys())
        strip, add = prefix if prefix is not None else ("", "")
        if strip or add:
            self.notes.append(
                f"{task.label}: {_prefix_note(strip, add)} its modules' names to match the base's"
            )

        def rename(name: str) -> str:
            return add + name[len(strip) :] if name.startswith(strip) else name

        task.modules = {rename(name): module for name, module in weights.items()}
        task.saved = {rename(name): name for name in adapter.saved}
        base = self.base_tensors
        shapes = {name: base[rename(name)].shape for name in weights if rename(name) in base}
        copies = {rename(name): info for name, info in adapter.base_copies.items()}
        task.adapter = replace(adapter.orient(shapes), base_copies=copies)


def find_inputs(recipe: Recipe, *, as_adapter: bool) -> tuple[Inputs, list[str]]:
    """Opens the inputs of a recipe, without reading a weight, and matches their names.

    Args:
        recipe: the recipe.
        as_adapter: whether an adapter is written, which needs no base.

    Returns:
        The inputs, and what does not fit.

    Raises:
        RecipeError: models that cannot give the output.
        CheckpointError: an input that cannot be read.
    """
    base: Input | None = None
    base_path: Path | None = None
    if recipe.base is not None:
        base = _open(_base_place(recipe, recipe.base), recipe.base)
        base_path = base.checkpoint.path if base.checkpoint is not None else None
    inputs = Inputs(base, [])
    try:
        chosen = {id(task) for task in recipe.tasks()}
        for i, entry in enumerate(recipe.models):
            if id(entry) not in chosen:
                continue
            task = _open(_task_place(entry.model, f"models[{i}]", base_path), entry.model)
            inputs.tasks.append(task)
            if as_adapter and not task.adapter_only:
                raise RecipeError(
                    f"{recipe.origin}: models[{i}].model: {task.label} is a full model, and an adapter can "
                    "only be made from adapters; leave out --as adapter"
                )
        if base is None and not as_adapter:
            adapters = [task.adapter for task in inputs.tasks if task.adapter is not None]
            names = sorted({adapter.base_name for adapter in adapters if adapter.base_name})
            hint = f" (the adapters name {', '.join(names)})" if names else ""
            only_adapters = all(task.adapter_only for task in inputs.tasks)
            or_adapter = ", or write an adapter with --as adapter" if only_adapters else ""
            raise RecipeError(f"{recipe.origin}: base_model is missing: give it{hint}{or_adapter}")
        try:
            inputs.match_names()
        except MismatchError as error:
            return inputs, [str(error)]
        return inputs, []
    except BaseException:
        inputs.close()
        raise


def reopen_inputs(base: Place | None, tasks: Sequence[Place]) -> Inputs:
    """Opens inputs again, by their places.

    Raises:
        CheckpointError: an input that cannot be read any more.
        ValueError: an input is a state dict, which no path leads to.
    """
    for place in [*([base] if base is not None else []), *tasks]:
        if place.kind == "state dict":
            raise ValueError(f"{place.label} is a state dict: only the process that holds it can open it")
    inputs = Inputs(None if base is None else _open(base, None), [])
    try:
        inputs.tasks += [_open(place, None) for place in tasks]
        inputs.match_names()
    except BaseException:
        inputs.close()
        raise
    return inputs


def _base_place(recipe: Recipe, reference: ModelRef) -> Place:
    if reference.adapter is not None:
        raise RecipeError(
            f"{recipe.origin}: base_model: {reference.label} names an adapter on top of a model; merge the "
            "adapter into the model first and give the result as base_model"
        )
    if not isinstance(reference.source, str):
        return Place("base_model", "state dict")
    path = resolve(reference.source)
    if is_adapter(path):
        raise RecipeError(
            f"{recipe.origin}: base_model: {reference.label} is an adapter, give the model it is for"
        )
    return Place(reference.label, "model", str(path))


def _task_place(reference: ModelRef, position: str, base_path: Path | None) -> Place:
    if not isinstance(reference.source, str):
        return Place(position, "state dict")
    path = resolve(reference.source)
    if reference.adapter is None:
        if is_adapter(path):
            return Place(reference.label, "adapter", adapter=str(path))
        return Place(reference.label, "model", str(path))
    adapter = str(resolve(reference.adapter))
    if base_path is not None and path.resolve() == base_path.resolve():
        return Place(reference.label, "adapter", adapter=adapter)
    return Place(reference.label, "model + adapter", str(path), adapter)


def _open(place: Place, reference: ModelRef | None) -> Input:
    if place.kind == "state dict":
        assert reference is not None  # reopen_inputs refuses state dicts
        assert not isinstance(reference.source, str)
        return Input(place, open_checkpoint(reference.source))
    checkpoint = None if place.checkpoint is None else open_checkpoint(place.checkpoint)
    return Input(place, checkpoint, None if place.adapter is None else open_adapter(Path(place.adapter)))


def _tied_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the name that is written for every other tied name: the shared table if there is one."""
    tied = {}
    for names in checkpoint.tied:
        kept = next((name for name in names if name.split(".")[-2:] == ["shared", "weight"]), names[0])
        tied.update({name: kept for name in names if name != kept})
    return tied


def _prefix_note(strip: str, add: str) -> str:
    return f"{add!r} is put before" if add else f"{strip!r} is taken from"
