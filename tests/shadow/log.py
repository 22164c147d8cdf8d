"""The launch log: what ran on a shadow device, with shapes, FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

# Matrix factorisations: what a GPU leaves to its solver library, and waits for.
FACTORISATIONS = (
    "linalg_qr",
    "geqrf",
    "linalg_householder_product",
    "linalg_svd",
    "linalg_eigh",
    "linalg_eig",
    "linalg_cholesky",
    "cholesky",
    "linalg_lu",
    "linalg_solve",
    "linalg_inv",
    "linalg_ldl",
    "linalg_lstsq",
)


@dataclass(frozen=True)
class Launch:
    """One operation on a device.

    Attributes:
        op: its name in torch, without the namespace.
        device: number of the device.
        shapes: of its tensors, inputs first.
        dtypes: of the same tensors.
        flops: of the products that torch counts; 0 for all else.
        nbytes: that it reads and writes. A tensor expanded from fewer numbers counts as if it were full.
        where: file and line of dirmerge that asked for it.
    """

    op: str
    device: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    flops: int
    nbytes: int
    where: str

    @property
    def factorisation(self) -> int:
        """The smaller side of the matrix it factorises; 0 for all else."""
        name = self.op.removeprefix("_")
        if not name.startswith(FACTORISATIONS) or not self.shapes or len(self.shapes[0]) < 2:
            return 0
        return min(self.shapes[0][-2:])

    @property
    def is_checked(self) -> bool:
        """Whether torch waits for the device to see if it succeeded."""
        name = self.op.removeprefix("_")
        return name.startswith(CHECKED) and not name.endswith(("_ex", "_triangular"))


# Of these CUDA's torch reads on the host whether they succeeded; what ends in _ex it leaves to the caller.
CHECKED = (
    "linalg_svd",
    "linalg_eigh",
    "linalg_eig",
    "linalg_solve",
    "linalg_inv",
    "linalg_lstsq",
    "cholesky",
)


def flops_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Returns the FLOPs of a product, as torch's own counter has them; 0 for all else."""
    # The counter does not know the forms that write in place.
    name = func._schema.name.split("::")[1].removesuffix("_")
    counter = flop_registry.get(getattr(torch.ops.aten, name, None))
    return 0 if counter is None else int(counter(*args, **kwargs, out_val=out))


def moved(func: Any, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor], written: set[int]) -> int:
    """Returns the bytes that an operation reads and writes.

    Args:
        func: the operation.
        given: tensors among its arguments.
        made: its new results.
        written: ids of the arguments that it writes.
    """
    name = func._schema.name.split("::")[1]
    if "empty" in name:
        return 0
    is_pattern = name.startswith("new_") or name.endswith("_like")  # the arguments give shape and dtype alone
    is_filled = name in ("fill_", "zero_", "copy_") or func._overloadname.endswith("out")
    read = [t for t in given if not (is_pattern or (is_filled and id(t) in written))]
    stored = [*made, *(t for t in given if id(t) in written)]
    return sum(t.numel() * t.element_size() for t in (*read, *stored))
