"""Sources of the merged updates of an inspection: the method, or the files of a finished merge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dirmerge.checkpoints.adapters import open_adapter
from dirmerge.checkpoints.files import read_json_object
from dirmerge.checkpoints.hashing import ALGORITHMS, HASH, hash_file
from dirmerge.checkpoints.output import MANIFEST
from dirmerge.checkpoints.reader import open_checkpoint
from dirmerge.deltas.difference import Difference
from dirmerge.engine.deltas import DeltaReader
from dirmerge.errors import CheckpointError, DirmergeError, MismatchError, RecipeError
from dirmerge.methods import Factors, Tasks, merge_tasks
from dirmerge.methods.tasks import Delta
from dirmerge.planning import Plan, TensorPlan, make_plan
from dirmerge.recipe import load_recipe


class Updates(Protocol):
    """Source of merged updates."""

    def get(
        self, tensor: TensorPlan, index: int | None, tasks: Tasks, weights: list[float], seed: int
    ) -> tuple[Delta, Factors | None, list[str]]:
        """Returns a matrix's merged update, the task factors where the method computed them, and notes."""


class ComputedUpdates:
    """Merged updates computed by the recipe's method, without λ."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def get(
        self, tensor: TensorPlan, index: int | None, tasks: Tasks, weights: list[float], seed: int
    ) -> tuple[Delta, Factors | None, list[str]]:
        """Merges the tasks by the recipe's method."""
        merged = merge_tasks(tasks, self.plan.method_name, weights, tensor.options, seed)
        return merged.value, merged.factors, [*merged.record.fallbacks, *merged.record.notes]


class WrittenUpdates:
    """Merged updates as a finished merge wrote them, λ and rounding included."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.read = DeltaReader.of(plan)
        self._checkpoint = self._adapter = None
        if plan.output == "adapter":
            adapter = open_adapter(folder)
            shapes = {f"{t.module}.weight": t.shape for t in plan.tensors if t.module is not None}
            self._adapter = adapter.orient(shapes)
        else:
            self._checkpoint = open_checkpoint(folder)

    def get(
        self, tensor: TensorPlan, index: int | None, tasks: Tasks, weights: list[float], seed: int
    ) -> tuple[Delta, Factors | None, list[str]]:
        """Reads the update from the folder: an adapter's factors, or W − W_0 of a model, on the device."""
        if self._adapter is not None:
            target = self._adapter.targets.get(tensor.module or "")
            if target is None or target.shape != tasks.shape:
                raise MismatchError(f"{self.folder}: has no update of {tensor.name} with shape {tasks.shape}")
            return target.read(device=tasks.device), None, []
        assert self._checkpoint is not None  # one of the two forms
        info = self._checkpoint.tensors.get(tensor.name)
        if info is None or tuple(info.shape) != tensor.shape:
            raise MismatchError(f"{self.folder}: has no tensor {tensor.name} of shape {tensor.shape}")
        rows = (None, None) if index is None else (index, index + 1)
        written, base = (
            read(tensor.name, *rows).reshape(tasks.shape).to(tasks.device)
            for read in (self._checkpoint.read, self.read.base)
        )
        return Difference(written, base).dense(), None, []

    def close(self) -> None:
        """Closes the folder's files."""
        if self._checkpoint is not None:
            self._checkpoint.close()


def open_finished(folder: Path) -> tuple[dict[str, Any], Plan]:
    """Opens a finished merge's manifest and plans its recipe again, from unchanged inputs."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}; give a recipe, or a folder that `dirmerge merge` has written"
        )
    manifest = read_json_object(path, limit=1 << 28)
    recipe, output, inputs = (manifest.get(key) for key in ("recipe", "output", "inputs"))
    if not isinstance(recipe, dict) or output not in ("model", "adapter") or not isinstance(inputs, list):
        raise CheckpointError(f"{path}: is not the manifest of a merge: recipe, output or inputs are missing")
    if any(isinstance(entry, dict) and entry.get("kind") == "state dict" for entry in inputs):
        raise CheckpointError(f"{path}: the merge was made from state dicts in memory, which no longer exist")
    try:
        loaded = load_recipe(recipe)
    except RecipeError as error:
        raise RecipeError(f"{path}: its recipe is not valid: {error}") from error
    try:
        plan = make_plan(loaded, as_adapter=output == "adapter")
    except DirmergeError as error:
        raise type(error)(
            f"{path}: the inputs of this merge cannot be opened as its recipe names them (relative paths "
            f"count from the working directory): {error}"
        ) from error
    try:
        _check_unchanged(path, inputs, plan)
    except BaseException:
        plan.close()
        raise
    return manifest, plan


def _check_unchanged(path: Path, inputs: list[Any], plan: Plan) -> None:
    known = {
        (number, file["name"]): (algorithm, file[algorithm])
        for number, entry in enumerate(inputs)
        if isinstance(entry, dict)
        for file in entry.get("files", [])
        if isinstance(file, dict) and isinstance(file.get("name"), str)
        for algorithm in ALGORITHMS
        if isinstance(file.get(algorithm), str)
    }
    for number, item in enumerate(plan.inputs):
        for file in item.files:
            algorithm, digest = known.get((number, Path(file.path).name), (HASH, None))
            if digest is None or digest != hash_file(file.path, algorithm):
                raise MismatchError(
                    f"{file.path}: is not the file that was merged ({path} has another hash for this "
                    "input, or none); merge again, or inspect the recipe instead"
                )


def scale_text(manifest: Mapping[str, Any]) -> str:
    """Returns in words which λ a manifest reports."""
    found = manifest.get("scale")
    if not isinstance(found, dict):
        return "as written"
    parts = []
    for key, text in (("value", "λ = {:.4g}"), ("alignment", "alignment {:.3g}")):
        value = found.get(key)
        if isinstance(value, (int, float)):
            parts.append(text.format(value))
    origin = found.get("origin")
    return f"{', '.join(parts) or 'λ per tensor'} ({origin if isinstance(origin, str) else 'as written'})"
