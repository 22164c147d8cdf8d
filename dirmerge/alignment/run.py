"""`dirmerge.align`: a recipe with a section `align` becomes one merged backbone and a head per task."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dirmerge.alignment.data import MissingPackageError, make_batches, read_inputs, task_seed
from dirmerge.alignment.features import Pooled, classifier, last_linear
from dirmerge.alignment.heads import FOLDER, CallableHead, Head, as_head, read_head, write_head
from dirmerge.alignment.learning import Learned, LearnProgress, adamerging, learn
from dirmerge.alignment.maps import Fit, MapKind, TaskMap, fit_task
from dirmerge.alignment.model import AlignmentTask, Model, read_features
from dirmerge.checkpoints.adapters import is_adapter, open_adapter
from dirmerge.checkpoints.reader import open_checkpoint, resolve
from dirmerge.checkpoints.safetensors_io import read_tensor
from dirmerge.checkpoints.writer import MANIFEST, OutputFolder
from dirmerge.deltas.lowrank import LowRank
from dirmerge.engine import pipeline
from dirmerge.engine.card import CARD
from dirmerge.engine.compute import Compute
from dirmerge.engine.deltas import DeltaReader
from dirmerge.engine.result import MergeResult, Progress
from dirmerge.errors import CheckpointError, MismatchError, RecipeError
from dirmerge.methods.tasks import Delta
from dirmerge.planning import Plan, ScalePlan, TensorPlan, make_plan
from dirmerge.recipe import Recipe, Setting, TensorRule, load_recipe
from dirmerge.recipe.align import AlignSection, AlignTask


@dataclass(frozen=True)
class AlignProgress:
    """One step of `align`: its phase (merge, features, learn, write), what was done, how many of how many."""

    phase: str
    name: str
    done: int
    total: int


@dataclass(eq=False)
class AlignResult:
    """A merged backbone with aligned heads.

    Attributes:
        path: the folder: an ordinary checkpoint, and `heads/<task>.safetensors` with JSON.
        method: of the section `align`.
        merge: the result of the merge.
        heads: the heads by task, as they were written.
        fits: per task plain, aligned and control, measured without labels; None for AdaMerging, which needs
            no map.
        learned: what the learned form found, None for a closed form.
        notes: facts worth knowing.
        seconds: wall time.
    """

    path: Path
    method: str
    merge: MergeResult
    heads: dict[str, Head | CallableHead]
    fits: list[TaskMap] | None
    learned: Learned | None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything but tensors as plain data (JSON)."""
        plain: dict[str, Any] = {"method": self.method, "heads": list(self.heads), "notes": self.notes}
        plain["seconds"] = round(self.seconds, 3)
        if self.fits is not None:
            plain["tasks"] = {fit.name: _plain_fit(fit) for fit in self.fits}
        if self.learned is not None:
            plain["learned"] = self.learned.to_dict()
        return plain


def _plain_fit(fit: TaskMap) -> dict[str, Any]:
    plain: dict[str, Any] = {"inputs": fit.inputs, "held_out": fit.held_out}
    for name in ("plain", "aligned", "control"):
        value: Fit | None = getattr(fit, name)
        plain[name] = None if value is None else asdict(value)
    return plain


def align(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    state: str | Path | None = None,
    progress: Callable[[AlignProgress], None] | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    memory: int | str | None = None,
) -> AlignResult:
    """Merge fine-tuned transformers and align every task's features: one backbone, a head per task.

    The recipe's section `align` says how, and where each task's unlabelled texts or images are.

    Args:
        recipe: a YAML file, YAML text of several lines, or the same as a dict.
        out: the folder to write, which appears complete or not at all.
        overwrite: whether an existing folder may be replaced; only one that dirmerge wrote and that holds no
            input, no recipe and not the working directory is.
        state: a file `….safetensors` from which an interrupted learning goes on.
        progress: called with an AlignProgress.
        device: as of `dirmerge.merge`.
        threads: of the CPU; torch's number by default.
        memory: as of `dirmerge.merge`, for the merge; the models that are aligned are not counted.

    Returns:
        AlignResult; its fits always hold the control, what the same map makes of the base model.

    Raises:
        RecipeError: an invalid recipe, one without `align`, or data without the column asked for.
        MissingPackageError: transformers or datasets is not installed (the extra `align`).
        CheckpointError: a model, head or data file that cannot be read.
        MismatchError: models that do not fit together, or whose features need weights the merge lacks.
        OutputError: the folder exists or cannot be written.

    Example:
        >>> result = dirmerge.align("recipe.yml", "merged")
        >>> head = dirmerge.alignment.read_heads("merged")["movies"].head
    """
    began = time.perf_counter()
    compute = Compute.resolve(device, threads, memory)
    loaded = load_recipe(recipe)
    if loaded.align is None:
        raise RecipeError(f"{loaded.origin}: align: is missing; it lists every task's unlabelled inputs")
    _transformers()
    protected = [*loaded.files, *([Path(state)] if state is not None else [])]
    with OutputFolder(Path(out), overwrite, protected) as folder, compute.scoped_threads():
        job = _Job(loaded, loaded.align, compute, progress)
        inner = folder.path / "merged"
        result = job.run(inner, state)
        for entry in sorted(inner.iterdir()):
            entry.rename(folder.path / entry.name)
        inner.rmdir()
        result.path, result.merge.path = Path(out), Path(out)
        result.seconds = time.perf_counter() - began
        fits = {fit.name: _plain_fit(fit) for fit in result.fits or []}
        for source in job.sources:
            info = {"method": result.method, "features": source.reads, **fits.get(source.name, {})}
            write_head(folder.path / FOLDER, source.name, result.heads[source.name], info)
        _document(folder.path, result)
        folder.commit()
    return result


@dataclass
class _Source:
    """One task: its fine-tune, its unlabelled inputs, and how its module is made.

    Attributes:
        section: of the recipe.
        t: number of the fine-tune.
        folder: whose configuration and tokenizer the module takes: the fine-tune's, an adapter's base's.
        adapter: the adapter's folder, None for a full model.
        inputs: texts or images.
        images: which of the two.
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

    def module(self, *, empty: bool = False) -> torch.nn.Module:
        """Make the float32 module with the fine-tune's weights; an adapter's has the base's."""
        transformers = _transformers()
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
        return module.eval()

    def task(self, module: torch.nn.Module, section: AlignSection) -> AlignmentTask:
        """The task's batches, reader and head."""
        batches = make_batches(self.inputs, self.images, self.folder, section.batch_size, section.max_length)
        if self.section.head is None:
            reader, own = classifier(module)
            task = AlignmentTask(self.name, batches, own, reader)
            self._check(module, task)
            return task
        stored = read_head(self.section.head)
        if stored.head is None:
            raise CheckpointError(f"{self.section.head}: holds a map alone, and a head is needed")
        return AlignmentTask(self.name, batches, stored.head, Pooled(self.section.features))

    @torch.no_grad()
    def _check(self, module: torch.nn.Module, task: AlignmentTask) -> None:
        """Check that the head on the features gives the model's logits: not all classifiers are linear."""
        batch = task.batch_list()[0]
        expected = Model(module).run(batch).logits
        found = as_head(task.head)(task.features(Model(module), batch))
        if found.shape != expected.shape or float((found - expected).norm()) > 1e-3 * float(expected.norm()):
            raise MismatchError(
                f"task {self.name}: the logits of {type(module).__name__} are not a linear layer of its last "
                "features, so no map folds into it; use the Python API with features and a head of your own"
            )

    def names(self, module: torch.nn.Module, known: Iterable[str]) -> dict[str, str]:
        """The module's name of every known tensor of the merge that it has.

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


class _Job:
    """One run of `align`."""

    def __init__(
        self,
        recipe: Recipe,
        section: AlignSection,
        compute: Compute,
        progress: Callable[[AlignProgress], None] | None,
    ) -> None:
        self.section = section
        self.compute = compute
        self.progress = progress
        self.notes: list[str] = []
        self.sources = _sources(recipe, section)
        paths = {last_linear(s.module(empty=True)) for s in self.sources if s.section.head is None}
        self.notes += [f"{path}: every task keeps its own, in {FOLDER}/" for path in sorted(paths)]
        rules = tuple(TensorRule(match=(f"{path}.*", f"*.{path}.*"), rule="drop") for path in sorted(paths))
        self.recipe = _changed(recipe, tensors=(*rules, *recipe.tensors)) if rules else recipe

    def run(self, folder: Path, state: str | Path | None) -> AlignResult:
        """Merge into `folder`, and align."""
        method = self.section.method
        if method in ("learned", "adamerging"):
            return self._learned(folder, state)
        merged = self._merge(make_plan(self.recipe), folder)
        with open_checkpoint(folder) as checkpoint:
            weights = {name: _wide(checkpoint.read(name)) for name in checkpoint.tensors}
        plan = make_plan(self.recipe)
        fits = self._fit(plan, weights, "rotation" if method == "rotation" else "ridge")
        plan.close()
        heads = {fit.name: fit.head for fit in fits}
        return AlignResult(folder, method, merged, heads, fits, None, [*self.notes, *merged.notes])

    def _merge(self, plan: Plan, folder: Path | None) -> MergeResult:
        def step(value: Progress) -> None:
            self._tell("merge", value.name, value.done, value.total)

        return pipeline.run(plan, folder, progress=step, compute=self.compute)

    def _tell(self, phase: str, name: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(AlignProgress(phase, name, done, total))

    def _fit(self, plan: Plan, weights: Mapping[str, Tensor], kind: MapKind) -> list[TaskMap]:
        """Fit every task's map, one fine-tune in memory at a time."""
        reader = DeltaReader.of(plan)
        base = _base_weights(reader, plan)
        section, found = self.section, []
        for i, source in enumerate(self.sources):
            own = self._own(plan, reader, source, weights, base)
            module = own.module
            task = source.task(module, section)
            names = source.names(module, weights)
            models = [
                Model(module, {inner: values[name] for name, inner in names.items() if name in values})
                for values in (weights, base)
            ]
            a, control = (read_features(model, task) for model in models)
            b = read_features(own, task)
            found.append(
                fit_task(task, a, b, control, kind=kind, ridge=section.ridge, held_out=section.held_out)
            )
            self._tell("features", task.name, i + 1, len(self.sources))
        return found

    def _own(
        self,
        plan: Plan,
        reader: DeltaReader,
        source: _Source,
        weights: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
    ) -> Model:
        """The fine-tune of a task, in a module of its own."""
        module = source.module()
        if source.adapter is None:
            return Model(module)
        names = source.names(module, weights)
        values = {name: base[name] for name in names if name in base}
        for tensor in plan.tensors:
            delta = reader.delta(tensor, source.t) if tensor.name in names else None
            if delta is not None:
                dense = delta.dense() if isinstance(delta, LowRank) else delta
                values[tensor.name] = values[tensor.name] + dense
        return Model(module, {names[name]: value for name, value in values.items()})

    def _finetunes(self, plan: Plan, weights: Mapping[str, Tensor]) -> Iterator[Model]:
        """Every task's fine-tune, one in memory at a time."""
        reader = DeltaReader.of(plan)
        base = _base_weights(reader, plan)
        for source in self.sources:
            yield self._own(plan, reader, source, weights, base)

    def _learned(self, folder: Path, state: str | Path | None) -> AlignResult:
        """Learn λ (and rotations), then merge again with what was learned."""
        section = self.section
        first = self._merge(make_plan(_changed(self.recipe, out_dtype="float32")), None)
        assert first.state_dict is not None  # merged in memory
        fixed = {name: _wide(value) for name, value in first.state_dict.items()}
        plan = make_plan(self.recipe)
        reader = DeltaReader.of(plan)
        fits = None
        if section.method == "learned" and section.start != "identity":
            fits = self._fit(plan, fixed, section.start)
        module = self.sources[0].module()
        tasks = []
        for source in self.sources:
            own = module if source is self.sources[0] else source.module()
            tasks.append(source.task(own, section))
            del own
        names = self.sources[0].names(module, fixed)
        start = {r.name: r.scale for r in first.records if r.scale and r.name in names}
        updates: dict[str, list[Delta]] = {}
        for tensor in plan.tensors:
            scale = start.get(tensor.name)
            if tensor.rule != "merge" or scale is None:
                continue
            merged, base = fixed[tensor.name], _wide(reader.base(tensor.name))
            fixed[tensor.name] = base
            updates[tensor.name] = [(merged - base) / scale]
            if section.method == "adamerging":
                updates[tensor.name] = _deltas(reader, tensor)
        model = Model(module, {inner: fixed[name] for name, inner in names.items()})
        inside = {names[name]: parts for name, parts in updates.items()}
        scales = {names[name]: start[name] for name in updates}

        def told(value: LearnProgress) -> None:
            self._tell("learn", f"loss {value.loss:.4f}", value.step, value.steps)

        options, own_models = section.learn, self._finetunes(plan, fixed)
        if section.method == "adamerging":
            common = next(iter(scales.values()))
            found = adamerging(
                model, inside, tasks, options, scale=common, own=own_models, state=state, progress=told
            )
        else:
            maps = None if fits is None else [fit.matrix for fit in fits]
            found = learn(
                model,
                inside,
                tasks,
                options,
                scale=scales,
                maps=maps,
                own=own_models,
                state=state,
                progress=told,
            )
        plan.close()
        learned = {name: found.scales[names[name]] for name in updates}
        result = self._merge(_with_scales(make_plan(self.recipe), learned), folder)
        notes = [*self.notes, *result.notes] + ([] if found.stopped is None else [found.stopped])
        if found.best_step < found.steps:
            notes.append(
                f"the state after {found.best_step} of {found.steps} steps was kept: its predictions agree "
                "most with those of the fine-tunes"
            )
        heads = {task.name: head for task, head in zip(tasks, found.heads, strict=True)}
        return AlignResult(folder, section.method, result, heads, fits, found, notes)


def _sources(recipe: Recipe, section: AlignSection) -> list[_Source]:
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
        found.append(_Source(task, t, folder, adapter, inputs, images))
    return found


def _changed(recipe: Recipe, **update: Any) -> Recipe:
    """The recipe with some fields replaced; what it reports of itself stays what the user wrote."""
    changed = recipe.model_copy(update=update)
    changed._plain, changed._origin, changed._file = recipe._plain, recipe._origin, recipe._file
    return changed


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _base_weights(reader: DeltaReader, plan: Plan) -> dict[str, Tensor]:
    return {tensor.name: _wide(reader.base(tensor.name)) for tensor in plan.tensors if tensor.in_base}


def _deltas(reader: DeltaReader, tensor: TensorPlan) -> list[Delta]:
    """The deltas of all fine-tunes, times their weights in the recipe."""
    found: list[Delta] = []
    for source in tensor.sources:
        delta = reader.delta(tensor, source.task)
        if delta is None:
            found.append(torch.zeros(tensor.shape))
        elif isinstance(delta, LowRank):
            found.append(delta.scaled(source.weight))
        else:
            found.append(delta * source.weight)
    return found


def _with_scales(plan: Plan, scales: Mapping[str, Sequence[float]]) -> Plan:
    """The plan with learned λ: one per tensor as its scale, one per fine-tune as their weights."""
    for i, tensor in enumerate(plan.tensors):
        values = scales.get(tensor.name)
        if values is None:
            continue
        if len(values) == 1:
            plan.tensors[i] = replace(tensor, scale=values[0], aligned=False)
        else:
            pairs = zip(tensor.sources, values, strict=True)
            sources = tuple(replace(source, weight=source.weight * value) for source, value in pairs)
            plan.tensors[i] = replace(tensor, scale=1.0, sources=sources, aligned=False)
    plan.scale = ScalePlan(Setting(((None, 1.0),)), None, "model", "learned without labels")
    return plan


def _document(folder: Path, result: AlignResult) -> None:
    """Add the alignment to the two documents of the merge."""
    manifest = folder / MANIFEST
    content = json.loads(manifest.read_text(encoding="utf-8")) | {"align": result.to_dict()}
    manifest.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["", "## Heads", ""]
    lines.append(
        f"Every task has a head in `{FOLDER}/` with a map of the features folded in ({result.method})."
    )
    if result.fits is not None:
        lines += ["", "| task | agreement with its fine-tune, merged | aligned | base aligned (control) |"]
        lines.append("|---|---|---|---|")
        for fit in result.fits:
            cells = [f"{100 * f.agreement:.1f} %" for f in (fit.plain, fit.aligned, fit.control) if f]
            lines.append(f"| {fit.name} | {' | '.join(cells)} |")
    with (folder / CARD).open("a", encoding="utf-8") as card:
        card.write("\n".join(lines) + "\n")


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"models are run by the package {error.name}, which is missing: pip install 'dirmerge[align]'"
        ) from error
    hub: Any = transformers.utils.logging
    hub.disable_progress_bar()
    return transformers
