"""Tensors that say they are on a GPU, and what happens to every operation on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch._meta_registrations  # shapes of the operations that have no meta kernel in C++
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from dirmerge.backends import table
from shadow.log import Launch, flops_of, moved
from shadow.streams import Allocation, RaceError, checksum

if TYPE_CHECKING:
    from shadow.gpu import Shadow

aten = torch.ops.aten
# Operations whose result's shape follows from values: the host must wait for them.
DATA_DEPENDENT = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount")


class ShadowTensor(torch.Tensor):
    """A tensor with CPU data and the address of a GPU.

    Attributes:
        data_on_cpu: the numbers; a meta tensor where the shadow has no values.
        allocation: the device memory it lies in.
    """

    data_on_cpu: torch.Tensor
    allocation: Allocation

    @staticmethod
    def __new__(cls, data: torch.Tensor, allocation: Allocation) -> ShadowTensor:
        made: ShadowTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=torch.device("meta"),
            dispatch_device=True,
            requires_grad=False,
        )
        made.data_on_cpu = data
        made.allocation = allocation
        return made

    def __init__(self, data: torch.Tensor, allocation: Allocation) -> None: ...

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShadowTensor({tuple(self.shape)}, {self.dtype}, cuda:{self.allocation.device})"

    def record_stream(self, stream: Any) -> None:
        """Tells the allocator that a stream uses the memory."""
        self.allocation.recorded.add(id(stream))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation."""
        from shadow.gpu import active

        return dispatch(active(), func, args, kwargs or {})


def dispatch(gpu: Shadow, func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operation on CPU data and notes what a GPU would have done."""
    if func is torch.ops.prim.device.default:
        tensor = args[0]
        if isinstance(tensor, ShadowTensor):
            return torch.device("cuda", tensor.allocation.device)
        return tensor.device
    flat = tree_flatten((args, kwargs))[0]
    shadows = [value for value in flat if isinstance(value, ShadowTensor)]
    if func is aten.is_pinned.default:
        return not shadows and gpu.is_pinned(args[0])
    if func is aten._pin_memory.default:
        return gpu.pin(args[0].clone())
    if func.namespace == "dirmerge" and shadows:
        name = func._schema.name.split("::")[1]
        if not gpu.values and kernel_of(name, args) is not None:
            return _launch(gpu, func, args, kwargs, flat, shadows, None)
        # Its torch implementation, on shadow tensors: what it launches is seen.
        with gpu.entered():
            return table.implementations(name, "cuda")["torch"].function(*args, **kwargs)
    if shadows and func._can_decompose():
        # Inside an op of ours torch hands composite operations over whole.
        with gpu.entered():
            return func.decompose(*args, **kwargs)
    target = kwargs.get("device")
    asked = None if target is None else torch.device(target)
    if func is aten._local_scalar_dense.default and shadows:
        gpu.note_sync("reads a number")
        return func(answer(args[0]) if not gpu.values else args[0].data_on_cpu)
    if func in (aten._to_copy.default, aten.copy_.default):
        return _copy(gpu, func, args, kwargs)
    if not shadows and (asked is None or asked.type != "cuda"):
        pinned = kwargs.pop("pin_memory", None)
        made = func(*args, **kwargs)
        return gpu.pin(made) if pinned else made
    return _launch(gpu, func, args, kwargs, flat, shadows, asked)


def _launch(
    gpu: Shadow,
    func: Any,
    args: Any,
    kwargs: Any,
    flat: list[Any],
    shadows: list[ShadowTensor],
    asked: torch.device | None,
) -> Any:
    on_host = any(isinstance(t, torch.Tensor) and not isinstance(t, ShadowTensor) and t.dim() for t in flat)
    if on_host and shadows:  # alone they may be a pattern, as in empty_like(x, device="cuda")
        raise RuntimeError(
            f"Expected all tensors to be on the same device, got cuda and cpu in {func} at {gpu.line()}"
        )
    devices = {tensor.allocation.device for tensor in shadows}
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, got {sorted(devices)} in {func} at {gpu.line()}"
        )
    to_host = asked is not None and asked.type != "cuda"
    index = asked.index if asked is not None and asked.type == "cuda" else None
    device = index if index is not None else (devices.pop() if devices else gpu.current_device())
    if asked is not None:
        kwargs = {**kwargs, "device": gpu.data_device}
    kwargs.pop("pin_memory", None)
    if func._schema.name.split("::")[1] in DATA_DEPENDENT:
        gpu.note_sync("has a shape that follows from values")
    out = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
    if to_host:
        return out
    with gpu.lock:
        written = {
            id(value)
            for argument, value in [
                *zip(func._schema.arguments, args, strict=False),
                *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs),
            ]
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        same = {id(tensor.data_on_cpu): tensor for tensor in shadows}
        # Not by address: a storage without values has none.
        owners = {t.data_on_cpu.untyped_storage()._cdata: t.allocation for t in shadows if t.numel()}

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or isinstance(value, ShadowTensor):
                return value
            if id(value) in same:
                return same[id(value)]
            storage = value.untyped_storage()
            owner = owners.get(storage._cdata) if value.numel() else None
            if owner is None:
                owner = Allocation(gpu, device, storage.nbytes(), gpu.line())
                owners[storage._cdata] = owner
            return ShadowTensor(value, owner)

        wrapped = tree_map(wrap, out)
        made = [value for value in tree_flatten(wrapped)[0] if isinstance(value, ShadowTensor)]
        before = {id(tensor.allocation) for tensor in shadows}
        fresh = [tensor for tensor in made if id(tensor.allocation) not in before]
        if made and not fresh and not written:
            return wrapped  # a view
        stream = gpu.current(device)
        position = stream.tick()
        for tensor in shadows:
            if id(tensor) not in written:
                tensor.allocation.touched(stream, position, written=False)
        for tensor in shadows:
            if id(tensor) in written:
                tensor.allocation.touched(stream, position, written=True)
        for tensor in fresh:
            tensor.allocation.touched(stream, position, written=True)
        seen = [*shadows, *fresh]
        gpu.launches.append(
            Launch(
                func._schema.name.split("::")[1],
                device,
                tuple(tuple(tensor.shape) for tensor in seen),
                tuple(tensor.dtype for tensor in seen),
                flops_of(func, tree_map(_on_cpu, args), tree_map(_on_cpu, kwargs), out),
                moved(func, shadows, fresh, written),
                gpu.line(),
            )
        )
    return wrapped


def _copy(gpu: Shadow, func: Any, args: Any, kwargs: Any) -> Any:
    """Copies between and on devices."""
    if func is aten.copy_.default:
        target, source = args[0], args[1]
        non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    else:
        target, source = None, args[0]
        non_blocking = bool(kwargs.get("non_blocking", False))
    from_gpu = isinstance(source, ShadowTensor)
    if target is not None:
        device = target.allocation.device if isinstance(target, ShadowTensor) else None
    else:
        asked = kwargs.get("device")
        asked = None if asked is None else torch.device(asked)
        if asked is None:
            device = source.allocation.device if from_gpu else None
        elif asked.type == "cuda":
            device = asked.index if asked.index is not None else gpu.current_device()
        else:
            device = None
    if device is None and not from_gpu:
        return func(*args, **kwargs)
    gpu.delay()
    with gpu.lock:
        source_data = _on_cpu(source)
        if target is None:
            rest = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
            if device is not None:
                rest["device"] = gpu.data_device
            elif not gpu.values:
                source_data = answer(source)
            out = func(source_data, **rest)
        else:
            out = target if device is None else target.data_on_cpu
        value = source_data if device is not None or gpu.values else answer(source)
        if device is None:
            stream = gpu.current(source.allocation.device)
            source.allocation.touched(stream, stream.tick(), written=False)
            gpu.note_copy("out", source.allocation.device, source.numel() * source.element_size())
            gpu.to_host(stream, out, value.to(out.dtype), non_blocking)
            return out
        stream = gpu.current(device)
        if from_gpu and source.allocation.device != device:
            # A copy between devices waits for the current streams of both.
            other = gpu.current(source.allocation.device)
            other.tick()
            stream.clock |= other.clock
            other.clock |= stream.clock
        if target is None:
            target = ShadowTensor(out, Allocation(gpu, device, out.untyped_storage().nbytes(), gpu.line()))
        else:
            target.data_on_cpu.copy_(value)
        position = stream.tick()
        if from_gpu:
            reading = gpu.current(source.allocation.device)
            source.allocation.touched(reading, reading.clock[id(reading)], written=False)
        target.allocation.touched(stream, position, written=True)
        nbytes = value.numel() * value.element_size()
        if from_gpu:
            if source.allocation.device != device:
                gpu.note_copy("peer", device, nbytes)
            shapes = (tuple(source.shape), tuple(target.shape))
            kinds = (source.dtype, target.dtype)
            stored = target.numel() * target.element_size()
            gpu.launches.append(Launch("copy_", device, shapes, kinds, 0, nbytes + stored, gpu.line()))
        else:
            gpu.note_copy("in", device, nbytes)
            gpu.from_host(stream, value, non_blocking)
        return target


def kernel_of(op: str, args: Sequence[Any]) -> str | None:
    """Returns "triton" or "native", the kernel that an op of dirmerge has for its input on a GPU, or None."""
    first = next(value for value in tree_flatten(args)[0] if isinstance(value, torch.Tensor))
    found = table.implementations(op, "cuda")
    for name in table.preference(op):
        if name != "torch" and name in found:
            dtypes = found[name].dtypes
            if dtypes is None or first.dtype in dtypes:
                return name
    return None


def answer(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what is read of a tensor without values: 1, True, and 0 of integers, which count faults."""
    whole = not tensor.dtype.is_floating_point and tensor.dtype != torch.bool
    with _disable_current_modes():
        return torch.full(tuple(tensor.shape), 0 if whole else 1, dtype=tensor.dtype)


def _on_cpu(value: Any) -> Any:
    return value.data_on_cpu if isinstance(value, ShadowTensor) else value


__all__ = ["RaceError", "ShadowTensor", "checksum", "dispatch"]
