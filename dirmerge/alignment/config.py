"""Settings of the alignment as pydantic models: of the learned form, and the recipe's section `align`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


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
    watch: Count = 4
    min_agreement: Fraction = 0.6
    max_shift: Fraction = 0.3

    def to_plain(self) -> dict[str, Any]:
        """Return the options as plain data (JSON)."""
        return self.model_dump()
