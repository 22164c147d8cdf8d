"""DeltaReader: the one place that turns a plan's sources into weights and deltas, with the finite check."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dirmerge import ops
from dirmerge.checkpoints.adapters import ReadRows
from dirmerge.checkpoints.safetensors_reader import TensorInfo, read_tensor
from dirmerge.deltas.difference import Difference
from dirmerge.deltas.lowrank import LowRank
from dirmerge.engine.reading import Read
from dirmerge.errors import NonFiniteError
from dirmerge.linalg.conditions import holds
from dirmerge.methods import Tasks
from dirmerge.methods.tasks import Delta, TaskDelta
from dirmerge.planning import Plan, Source, TensorPlan
from dirmerge.planning.inputs import Input, Inputs

CPU = torch.device("cpu")


class DeltaReader:
    """Reads weights and deltas; NaN and Inf are errors that name the file they come from.

    Args:
        inputs: of the plan, opened.
        read: reads rows of a tensor that lies in a file.
    """

    def __init__(self, inputs: Inputs, read: ReadRows = read_tensor) -> None:
        self.inputs = inputs
        self._read = read

    @classmethod
    def of(cls, plan: Plan) -> DeltaReader:
        """Returns a reader of a plan's inputs, which it opens where they are not open."""
        return cls(plan.open())

    def base_read(self, name: str, start: int | None = None, stop: int | None = None) -> Read:
        """Returns the read of rows of the base's tensor."""
        base = self.inputs.base
        assert base is not None  # a rule that reads the base is planned only where there is one
        return Read(base, _info(base, base.tensors[name], False), start, stop)

    def value_read(self, source: Source, start: int | None = None, stop: int | None = None) -> Read | None:
        """Returns the read of rows of a fine-tune's own full tensor, None when it has only an update."""
        if not self.has_value(source):
            return None
        task, saved = self.inputs.tasks[source.task], source.saved is not None
        name = source.saved if source.saved is not None else source.tensor
        assert name is not None  # it has a value
        return Read(task, _info(task, name, saved), start, stop)

    def has_value(self, source: Source) -> bool:
        """Returns whether a fine-tune has a full tensor of its own, and not only an update of the base's."""
        return source.saved is not None or source.tensor is not None

    def matrix_reads(self, tensor: TensorPlan, index: int | None, *, base: bool) -> list[Read]:
        """Returns what `tasks` reads of one matrix, in its order.

        Args:
            tensor: the tensor.
            index: number of the slice of a stack, None for a tensor that is one matrix.
            base: whether the base is read even where no delta needs it.
        """
        rows = _matrix_rows(index)
        reads = [self.base_read(tensor.name, *rows)] if base or _needs_base(tensor) else []
        for source in tensor.sources:
            if source.weight == 0:
                continue
            value = self.value_read(source, *rows) if source.rank is None else None
            reads += [value] if value is not None else []
            if source.module is not None and source.saved is None:
                task = self.inputs.tasks[source.task]
                assert task.adapter is not None  # only adapters' sources have a module
                target = task.adapter.targets[source.module]
                reads += [Read(task, target.a), Read(task, target.b)]
        return reads

    def fetch(self, read: Read) -> Tensor:
        """Reads rows, in their stored dtype."""
        if read.info.file is not None:
            return self._read(read.info, read.start, read.stop)
        assert read.item.checkpoint is not None  # a state dict
        return read.item.checkpoint.read(read.info.name, read.start, read.stop)

    def base(
        self, name: str, start: int | None = None, stop: int | None = None, *, check: bool = True
    ) -> Tensor:
        """Returns rows of the base's tensor in its stored dtype."""
        read = self.base_read(name, start, stop)
        value = self.fetch(read)
        return check_finite(value, read.info, read.item) if check else value

    def check_base_copies(self) -> None:
        """Checks that adapters were made for this base, where they hold copies of its weights.

        Raises:
            MismatchError: a copy differs.
        """
        base = self.inputs.base
        for task in self.inputs.tasks:
            if base is not None and base.checkpoint is not None and task.adapter is not None:
                task.adapter.check_base_copies(base.checkpoint)

    def matrix_shape(self, tensor: TensorPlan) -> tuple[int, int]:
        """Returns the shape of the matrix that the method sees."""
        if tensor.slices is not None:
            return tensor.shape[1], tensor.shape[2]
        if len(tensor.shape) < 2:
            return 1, tensor.numel
        return tensor.shape[0], math.prod(tensor.shape[1:])

    def tasks(
        self, tensor: TensorPlan, index: int | None, device: torch.device = CPU
    ) -> tuple[Tasks, list[float]]:
        """Returns the deltas of one matrix as the method sees them, loaded one at a time, and their weights.

        A weight of 0 leaves its fine-tune out.

        Args:
            tensor: the tensor.
            index: number of the slice of a stack, None for a tensor that is one matrix.
            device: where the deltas are loaded.
        """
        sources = [source for source in tensor.sources if source.weight != 0]
        base: Tensor | None = None
        if _needs_base(tensor):
            base = self.base(tensor.name, *_matrix_rows(index), check=False)
            base = base.reshape(self.matrix_shape(tensor)).to(device)

        def load(source: Source) -> TaskDelta:
            return self._delta(tensor, source, index, base, device)

        tasks = Tasks(
            self.matrix_shape(tensor),
            [lambda source=source: load(source) for source in sources],  # type: ignore[misc]
            [source.rank for source in sources],
            [self.inputs.tasks[source.task].label for source in sources],
            device,
        )
        return tasks, [source.weight for source in sources]

    def delta(self, tensor: TensorPlan, t: int) -> Delta | None:
        """Returns W_t − W_0 of fine-tune t in the tensor's shape, an adapter's as its factors.

        None where it changes nothing.
        """
        source = next((source for source in tensor.sources if source.task == t), None)
        if source is None or not tensor.in_base or source.kind == "unchanged":
            return None
        if source.rank is not None:
            return self.low_rank(source)
        return self.rows(source, self.base(tensor.name), None, None, self.low_ranks(tensor).get(t))

    def low_rank(self, source: Source, device: torch.device = CPU) -> LowRank:
        """Returns the update of an adapter's module."""
        adapter = self.inputs.tasks[source.task].adapter
        assert adapter is not None  # only adapters' sources have a module
        assert source.module is not None
        return adapter.targets[source.module].read(self._read, device)

    def low_ranks(self, tensor: TensorPlan) -> dict[int, LowRank]:
        """Returns the updates of all adapters that change a tensor, by the number of the fine-tune."""
        return {s.task: self.low_rank(s) for s in tensor.sources if s.module is not None and s.saved is None}

    def rows(
        self, source: Source, base: Tensor | None, start: int | None, stop: int | None, update: LowRank | None
    ) -> Tensor:
        """Returns rows of W_t − W_0 (of W_t itself without a base), in memory of its own.

        Args:
            source: of the fine-tune.
            base: the same rows of W_0, None for a tensor that the base lacks.
            start: first row, None for all.
            stop: row after the last.
            update: of an adapter, the whole of it.
        """
        read = self.value_read(source, start, stop)
        value = None if read is None else check_finite(self.fetch(read), read.info, read.item)
        return self.combine(value, base, None if update is None else row_range(update, start, stop))

    def combine(self, value: Tensor | None, base: Tensor | None, update: LowRank | None) -> Tensor:
        """Returns rows of W_t − W_0 (of W_t itself without a base) from their parts, in memory of its own.

        Args:
            value: rows of the fine-tune's own full tensor, None when it has only an update.
            base: the same rows of W_0, None for a tensor that the base lacks.
            update: the same rows of an adapter's update.
        """
        part: Tensor | None = None
        if value is not None and base is not None:
            part = ops.delta(value, base).value
        elif value is not None:
            part = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
        if update is not None:
            low = update.dense()
            part = low if part is None else part.to(torch.promote_types(part.dtype, low.dtype)).add_(low)
        if part is None:
            assert base is not None  # unchanged by an adapter: the plan knows the base has it
            dtype = torch.promote_types(base.dtype, torch.float32)
            part = torch.zeros(base.shape, dtype=dtype, device=base.device)
        return part

    def _delta(
        self, tensor: TensorPlan, source: Source, index: int | None, base: Tensor | None, device: torch.device
    ) -> LowRank | Tensor | Difference:
        """Returns one task's delta, from disk every time: what the method does not keep is not in memory."""
        if source.rank is not None:
            return self.low_rank(source, device)
        assert base is not None  # tasks() reads it for dense deltas
        difference: Tensor | Difference
        if self.has_value(source):
            difference = self._difference(tensor, source, index, base)
        else:
            dtype = torch.promote_types(base.dtype, torch.float32)
            difference = torch.zeros(base.shape, dtype=dtype, device=device)
        if source.module is not None and source.saved is None:
            update = self.low_rank(source, device)
            left, right = update.folded()
            if isinstance(difference, Difference):
                difference = difference.dense()
            dtype = torch.promote_types(difference.dtype, update.dtype)
            difference = difference.to(dtype).addmm_(left.to(dtype), right.to(dtype).mT)
        return difference

    def _difference(self, tensor: TensorPlan, source: Source, index: int | None, base: Tensor) -> Difference:
        read = self.value_read(source, *_matrix_rows(index))
        assert read is not None  # asked by the caller
        value = self.fetch(read).reshape(base.shape).to(base.device)
        # A difference of finite weights is not finite only where both are near the end of float32.
        bound = _largest(value) + _largest(base)
        if not holds(bound <= torch.finfo(torch.float32).max):
            check_finite(value, read.info, read.item)
            self.base(tensor.name)
            difference(value, base, read.info, read.item)
        return Difference(value, base)


def difference(value: Tensor, base: Tensor, info: TensorInfo, item: Input) -> Tensor:
    """Returns W_t − W_0 of finite weights; NonFiniteError names the file where their difference overflows."""
    delta = ops.delta(value, base).value
    if not bool(torch.isfinite(delta).all()):
        raise NonFiniteError(
            f"{_place(info, item)}: tensor {info.name!r} minus the base's is not finite: its values are too "
            "large"
        )
    return delta


def row_range(update: LowRank, start: int | None, stop: int | None) -> LowRank:
    """Returns rows of a low-rank matrix."""
    return LowRank(update.left[start:stop], update.core, update.right)


def check_finite(value: Tensor, info: TensorInfo, item: Input) -> Tensor:
    """Returns the value; NonFiniteError names file and tensor where it holds NaN or Inf."""
    if value.is_floating_point() and not holds(_largest(value).isfinite()):
        raise NonFiniteError(f"{_place(info, item)}: tensor {info.name!r} holds NaN or Inf")
    return value


def _needs_base(tensor: TensorPlan) -> bool:
    return any(source.rank is None for source in tensor.sources)


def _matrix_rows(index: int | None) -> tuple[int | None, int | None]:
    return (None, None) if index is None else (index, index + 1)


def _info(item: Input, name: str, saved: bool) -> TensorInfo:
    if saved:
        assert item.adapter is not None  # only an adapter's source is saved beside it
        return item.adapter.saved[name]
    assert item.checkpoint is not None  # the other sources are tensors of a checkpoint
    return item.checkpoint.tensors[name]


def _largest(value: Tensor) -> Tensor:
    """Returns the largest magnitude, NaN where there is one, in one pass; 0-d, float64."""
    if value.numel() == 0:
        return value.new_zeros((), dtype=torch.float64)
    low, high = torch.aminmax(value)
    return torch.maximum(-low.double(), high.double())


def _place(info: TensorInfo, item: Input) -> str:
    return str(info.file) if info.file is not None else item.label
