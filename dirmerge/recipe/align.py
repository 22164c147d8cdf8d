"""Settings of the alignment as pydantic models: of the learned form, and the recipe's section `align`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


# A task's name is its head's file.
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LearnOptions(_Strict):
    """How λ and the rotations are learned.

    Attributes:
        steps: each takes one batch of every task.
        per: which parameters share their λ: none (`parameter`), those of a numbered layer (`block`), or all
            (`model`).
        rotate: whether every task learns a rotation of its features; AdaMerging does not.
        alpha: weight of the alignment with the simplex.
        beta: weight of the distance from the rotation target.
        lr_scale: Adam's rate for λ.
        lr_rotation: Adam's rate in the Lie algebra of SO(d). Collapse was seen at 1e-3.
        targets: the simplex nearest to the head's centred class vectors, or a random one.
        nearest_polar: with more than d + 1 classes, where no simplex exists, take the unit vectors nearest
            to the head's in the sense of the polar factor.
        ema: how much of a class mean stays when a batch with that class comes.
        refresh: steps between two updates of the rotation target.
        bf16: run the model under bfloat16 autocast.
        seed: of the order of the batches and of random targets.
        check_every: steps between two looks at the watched batches.
        watch: batches of each task that are watched.
        min_agreement: a run stops when a task's predictions agree less than this with those at the start.
        max_shift: or when this fraction of its predictions moved from some classes to others on balance.
    """

    steps: Count = 60
    per: Literal["parameter", "block", "model"] = "parameter"
    rotate: bool = True
    alpha: Weight = 0.8
    beta: Weight = 0.2
    lr_scale: Rate = 1e-2
    lr_rotation: Rate = 1e-5
    targets: Literal["head", "random"] = "head"
    nearest_polar: bool = False
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.9
    refresh: Count = 10
    bf16: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    check_every: Count = 10
    watch: Count = 8
    min_agreement: Fraction = 0.6
    max_shift: Fraction = 0.3

    def to_plain(self) -> dict[str, Any]:
        """Returns the options as plain data (JSON)."""
        return self.model_dump()


class AlignTask(_Strict):
    """One task of the recipe's section `align`: where its unlabelled inputs are.

    Attributes:
        name: of the task, and of its head's file.
        data: a csv, json, jsonl or parquet file, or a folder of images.
        column: of the texts or images; by default `text` or `image`.
        model: the fine-tune, as `models` lists it or its number from 0; by default the tasks are in the order
            of `models`.
        head: a head's file, as `dirmerge align` writes them; by default the fine-tune's own last layer.
        features: with a `head`, how an encoder's features are pooled: mean, cls, or the name of an output
            such as pooler_output or image_embeds.
    """

    name: TaskName
    data: str
    column: str | None = None
    model: Annotated[int, Field(ge=0)] | str | None = None
    head: str | None = None
    features: str = "mean"


class AlignSection(_Strict):
    """The recipe's section `align`, which `dirmerge align` reads and `dirmerge merge` leaves alone.

    Attributes:
        method: rotation and ridge are closed forms; learned is MDA's feature space; adamerging learns λ alone
            and needs merge_method task_arithmetic.
        start: what the learned form starts from: rotation, ridge, or identity.
        ridge: strength of the ridge map.
        inputs: at most so many inputs per task, drawn at random with the recipe's seed.
        batch_size: inputs per batch.
        held_out: fraction of the inputs that the reported fits are measured on.
        max_length: tokens of a text at most.
        learn: options of the learned form and of adamerging.
        tasks: one per fine-tune.
    """

    method: Literal["rotation", "ridge", "learned", "adamerging"] = "rotation"
    start: Literal["identity", "rotation", "ridge"] = "rotation"
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.3
    inputs: Count = 512
    batch_size: Count = 16
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
    max_length: Count = 128
    learn: LearnOptions = LearnOptions()
    tasks: tuple[AlignTask, ...]

    def problems(self, labels: Sequence[str], merge_method: str) -> list[str]:
        """Returns what does not fit the rest of the recipe.

        Args:
            labels: of the fine-tunes.
            merge_method: of the recipe.
        """
        found = []
        names = [task.name for task in self.tasks]
        found += [f"align.tasks: the name {name!r} is given twice" for name in sorted(_twice(names))]
        chosen = [self.index(i, labels) for i in range(len(self.tasks))]
        for i, index in enumerate(chosen):
            if index is None:
                task = self.tasks[i]
                found.append(
                    f"align.tasks[{i}].model: must be one of the {len(labels)} fine-tunes, got {task.model!r}"
                )
        missing = [label for t, label in enumerate(labels) if t not in chosen]
        if None not in chosen and (missing or len(set(chosen)) < len(chosen)):
            which = f", none is for {missing[0]}" if missing else ""
            found.append(f"align.tasks: must have one task per fine-tune ({len(labels)}){which}")
        if self.method == "adamerging" and merge_method != "task_arithmetic":
            found.append(
                "align.method: adamerging scales every task's own delta, which is merge_method: "
                f"task_arithmetic, got {merge_method}"
            )
        return found

    def index(self, i: int, labels: Sequence[str]) -> int | None:
        """Returns the number of the fine-tune that a task is for, None if there is no such."""
        model = self.tasks[i].model
        if isinstance(model, str):
            return list(labels).index(model) if model in labels else None
        position = i if model is None else model
        return position if position < len(labels) else None


def _twice(names: Sequence[str]) -> set[str]:
    return {name for name in names if names.count(name) > 1}
