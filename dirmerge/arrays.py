"""Functions written for torch tensors that take NumPy and CuPy arrays too, and return what they were given.

`of_any_kind` lends its function tensors over the same memory: NumPy's by the buffer protocol, those of CuPy
and of other libraries by DLPack. A copy is made only of what torch cannot address: NumPy arrays with negative
strides, foreign byte order or unaligned entries.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, NoneType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# What most calls consist of: such arguments are not looked into.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, int, float, bool, str, NoneType, torch.dtype})


class _Torch:
    """Tensors: the kind that needs nothing."""

    name = "torch"


class _NumPy:
    """NumPy arrays: the buffer protocol, on the CPU."""

    name = "numpy"

    def context(self, array: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def to_tensor(self, array: Any) -> Tensor:
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError("is a masked array: fill it first")
        whole = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
        if not (array.dtype.isnative and array.flags.aligned and whole):
            array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        elif not array.flags.writeable:
            # torch has no read-only tensors and warns; no function of dirmerge writes to its inputs.
            array = np.asarray(_Writable(array))
        try:
            return torch.from_numpy(array)
        except TypeError:
            raise TypeError(f"has dtype {array.dtype}, which torch does not take: convert it first") from None

    def from_tensor(self, tensor: Tensor, device: torch.device) -> Any:
        try:
            return tensor.detach().numpy()
        except TypeError:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(f"the result is {dtype}, which NumPy lacks: ask for another dtype") from None


class _Writable:
    """The memory of a read-only NumPy array under an interface that does not say so."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.__array_interface__ = {
            **array.__array_interface__,
            "data": (array.__array_interface__["data"][0], False),
        }


class _DLPack:
    """Arrays of a library that gives and takes by DLPack, on any device that torch knows."""

    def __init__(self, library: ModuleType) -> None:
        self.name = library.__name__
        self.library = library

    def context(self, array: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def to_tensor(self, array: Any) -> Tensor:
        tensor: Tensor = torch.utils.dlpack.from_dlpack(array)
        return tensor

    def from_tensor(self, tensor: Tensor, device: torch.device) -> Any:
        # Small findings come back on the CPU, but a library may know one device alone.
        return self.library.from_dlpack(tensor.detach().to(device))


class _CuPy(_DLPack):
    """CuPy arrays: DLPack, with torch on CuPy's stream."""

    def context(self, array: Any) -> AbstractContextManager[Any]:
        """Makes CuPy's current stream torch's.

        Either library gives memory out again in the order of its own stream: were there two, an array freed
        by one could be written while the other still reads it.
        """
        if not torch.cuda.is_available():
            raise TypeError("CuPy arrays are on a GPU, which this torch does not see: install torch for CUDA")
        device = array.device.id
        stream = self.library.cuda.get_current_stream(device).ptr
        # ExternalStream is not typed.
        external = torch.cuda.ExternalStream(stream, device=device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(external)


_TORCH, _NUMPY = _Torch(), _NumPy()
_Kind = _NumPy | _DLPack


@functools.cache
def _kind_of_class(of: type) -> _Torch | _Kind | None:
    if issubclass(of, Tensor):
        return _TORCH
    if issubclass(of, np.ndarray):
        return _NUMPY
    library = sys.modules.get(of.__module__.partition(".")[0])
    if library is None or not hasattr(of, "__dlpack__") or not hasattr(library, "from_dlpack"):
        return None
    return _CuPy(library) if library.__name__ == "cupy" else _DLPack(library)


def _kind_of(value: object) -> _Torch | _Kind | None:
    # Any: mypy does not take a class for hashable.
    of: Any = type(value)
    return _kind_of_class(of)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_plain(value: Any) -> bool:
    """Whether a list, a tuple or a dataclass holds nothing to look into."""
    if type(value) in (list, tuple):
        return _PLAIN.issuperset(map(type, value))
    # Without slots, as all of dirmerge are.
    if hasattr(value, "__dataclass_fields__") and hasattr(value, "__dict__"):
        return _PLAIN.issuperset(map(type, vars(value).values()))
    return False


def _arrays(value: Any) -> Iterator[tuple[Any, _Torch | _Kind]]:
    """The arrays in an argument: itself, the entries of a list, tuple or dict, the fields of a dataclass."""
    kind = _kind_of(value)
    if kind is not None:
        yield value, kind
    elif isinstance(value, list | tuple | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _arrays(entry)
    elif _is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _arrays(getattr(value, field.name))


def _mapped(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Returns value with its arrays converted; what holds none comes back as it is."""
    if _kind_of(value) is not None:
        return convert(value)
    if isinstance(value, list | tuple):
        entries = [_mapped(entry, convert) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    if isinstance(value, dict):
        return {key: _mapped(entry, convert) for key, entry in value.items()}
    if _is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: _mapped(held, convert) for name, held in fields.items()})
    return value


def of_any_kind(function: Callable[P, R]) -> Callable[P, R]:
    """Lets a function of torch tensors take NumPy arrays, CuPy arrays and others with DLPack as well.

    The arrays of one call must be of one kind, and every tensor in what it returns becomes that kind too, in
    lists, tuples, dicts and dataclasses as well. Calls with tensors alone pass through.

    Args:
        function: takes tensors, or lists, tuples, dicts and dataclasses of them, and does not write to them.

    Returns:
        The function with the same signature. It raises TypeError for kinds mixed in one call, and for dtypes
        that only one of the two libraries has.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for value in args:
            if type(value) not in _PLAIN and not _is_plain(value):
                return _of_their_kind(function, args, kwargs)
        for value in kwargs.values():
            if type(value) not in _PLAIN and not _is_plain(value):
                return _of_their_kind(function, args, kwargs)
        return function(*args, **kwargs)

    return call


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _of_their_kind(function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    if all(kind is _TORCH for value in (*args, *kwargs.values()) for _, kind in _arrays(value)):
        return function(*args, **kwargs)
    bound = _signature(function).bind(*args, **kwargs)
    given = {name: list(_arrays(value)) for name, value in bound.arguments.items()}
    kinds = {kind.name: kind for arrays in given.values() for _, kind in arrays}
    if len(kinds) > 1:
        listed = ", ".join(
            f"{name}: {' and '.join(dict.fromkeys(kind.name for _, kind in arrays))}"
            for name, arrays in given.items()
            if arrays
        )
        raise TypeError(f"{function.__name__}: all arrays must be of one library, got {listed}")
    (kind,) = kinds.values()
    assert not isinstance(kind, _Torch)
    with kind.context(next(array for arrays in given.values() for array, _ in arrays)):
        for name, value in bound.arguments.items():
            try:
                bound.arguments[name] = _mapped(value, kind.to_tensor)
            except (TypeError, BufferError) as error:
                raise TypeError(f"{function.__name__}: {name} {error}") from error
        device = next(tensor.device for tensor, _ in _arrays(bound.arguments))
        result = function(*bound.args, **bound.kwargs)
        converted: R = _mapped(result, lambda tensor: kind.from_tensor(tensor, device))
        return converted
