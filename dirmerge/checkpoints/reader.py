"""Opens models: Hugging Face folders, safetensors files and state dicts, all behind one Checkpoint."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor

from dirmerge.checkpoints.files import read_json_object
from dirmerge.checkpoints.safetensors_reader import TensorInfo, check_rows, read_header, read_tensor
from dirmerge.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = "model" + INDEX_SUFFIX
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
# files that trainers leave beside the weights
_NOT_WEIGHTS = re.compile(r"training_args|optimizer|scheduler|rng_state|scaler|trainer_state")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.safetensors")

_QUANTISED_DTYPES = {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
_PACKED_DTYPES = {torch.int8, torch.uint8}
# Companions of quantised weights: GPTQ and AWQ, bitsandbytes, fp8, compressed-tensors.
_QUANTISED_NAMES = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|weight_scale|weight_scale_inv|weight_packed|weight_zero_point"
    r"|input_scale)$|\.quant_state\."
)
# Names under which output and input embeddings are stored by models that can tie them.
_OUTPUT_EMBEDDINGS = re.compile(
    r"(.+\.)?(lm_head|embed_out|output_projection|cls\.predictions\.decoder)\.weight"
)
_INPUT_EMBEDDINGS = re.compile(
    r"(.+\.)?(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)\.weight"
)


class Checkpoint:
    """A model's tensors, known by their headers and read one at a time.

    Args:
        source: what to call it in messages.
        tensors: name to TensorInfo.
        path: the folder or file; None for a state dict.
        config: the content of config.json, if there is one.
        files: the weight files.
        tied: groups of names that are one tensor.
        state: the tensors of a state dict.
    """

    def __init__(
        self,
        source: str,
        tensors: Mapping[str, TensorInfo],
        *,
        path: Path | None = None,
        config: dict[str, Any] | None = None,
        files: list[Path] | None = None,
        tied: list[tuple[str, ...]] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.source = source
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self.path = path
        self.config = config
        self.files = files or []
        self.tied = tied or []
        self._state = dict(state) if state is not None else None
        self._closed = False

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {len(self.tensors)} tensors)"

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Reads a tensor, or its rows start:stop, into fresh memory on the CPU.

        Args:
            name: one of `tensors`.
            start: first row.
            stop: row after the last.

        Returns:
            A contiguous tensor in the stored dtype, owned by the caller: never a view of a state dict.

        Raises:
            CheckpointError: for an unknown name, or a file that cannot be read any more.
            ValueError: for rows out of range, or after close().
        """
        if self._closed:
            raise ValueError(f"{self.source} is closed")
        if name not in self.tensors:
            raise CheckpointError(f"{self.source} has no tensor {name!r}")
        if self._state is None:
            return read_tensor(self.tensors[name], start, stop)
        tensor = self._state[name].detach()
        if start is not None or stop is not None:
            if not tensor.ndim:
                raise ValueError(f"{name!r} is a scalar: it has no rows")
            begin, end = check_rows(start, stop, tensor.shape[0], name)
            tensor = tensor[begin:end]
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Lets go of a state dict; reading is an error from now on. No file is open between reads anyway."""
        self._closed = True
        self._state = None if self._state is None else {}


def open_checkpoint(source: str | Path | Mapping[str, Tensor]) -> Checkpoint:
    """Opens a model without reading a weight: only headers, the index and config.json.

    Args:
        source: a folder in the Hugging Face layout (model.safetensors, or shards with their index), a
            .safetensors file, or a state dict.

    Returns:
        The checkpoint, with every tensor of every file in it.

    Raises:
        CheckpointError: for pickled, quantised, incomplete, ambiguous or malformed checkpoints; says what to
            do.
    """
    if isinstance(source, Mapping):
        return _open_state_dict(source)
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _from_files(path.parent, str(path), *_read_index(path))
    if path.suffix == ".gguf":
        raise _gguf_error(path)
    if path.suffix in _PICKLES:
        raise pickle_error(path, [path])
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: must be a folder or a .safetensors file")
    match = _SHARD.fullmatch(path.name)
    if match and int(match["count"]) > 1:
        raise CheckpointError(f"{path}: is one of {int(match['count'])} shards; give the folder instead")
    return _from_files(path.parent, str(path), [path], None)


def pickle_error(path: Path, files: list[Path]) -> CheckpointError:
    """Returns the error that refuses pickled weights and says how to convert them."""
    names = ", ".join(file.name for file in files[:3]) + (", …" if len(files) > 3 else "")
    arguments = " ".join(shlex.quote(str(file)) for file in files)
    return CheckpointError(
        f"{path}: holds pickled weights only ({names}), which can run code when loaded. Convert them without "
        f"running any:\n  python -m dirmerge.checkpoints.convert {arguments}"
    )


def _open_state_dict(state: Mapping[str, Tensor]) -> Checkpoint:
    source = "state dict"
    infos: dict[str, TensorInfo] = {}
    storages: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{source}: must map names to tensors, got {type(name).__name__} {name!r}: "
                f"{type(tensor).__name__}"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise CheckpointError(
                f"{source}: tensor {name!r} must be dense and in memory, got {tensor.layout} on "
                f"{tensor.device}"
            )
        nbytes = tensor.numel() * tensor.element_size()
        infos[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape), None, 0, nbytes)
        if nbytes:
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            storages.setdefault(key, []).append(name)
    if not infos:
        raise CheckpointError(f"{source}: holds no tensor")
    _refuse_quantised(source, None, infos)
    tied = [tuple(names) for names in storages.values() if len(names) > 1]
    return Checkpoint(source, infos, tied=tied, state=state)


def _open_folder(folder: Path) -> Checkpoint:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from error
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    weights = [name for name in names if name.endswith(".safetensors") and name != ADAPTER_WEIGHTS]
    if INDEX in indices or (WEIGHTS not in weights and len(indices) == 1):
        files, where = _read_index(folder / (INDEX if INDEX in indices else indices[0]))
        if WEIGHTS in weights and folder / WEIGHTS not in files:
            raise CheckpointError(
                f"{folder}: holds both {WEIGHTS} and an index of other shards; remove the outdated one"
            )
        return _from_files(folder, str(folder), files, where)
    if WEIGHTS in weights:
        return _from_files(folder, str(folder), [folder / WEIGHTS], None)
    if len(indices) > 1:
        raise CheckpointError(f"{folder}: holds several indices ({', '.join(indices)}): give the one to use")
    shards = [_SHARD.fullmatch(name) for name in weights]
    if len(weights) == 1 and shards[0] is None:
        return _from_files(folder, str(folder), [folder / weights[0]], None)
    stems = {(match["stem"], int(match["count"])) for match in shards if match}
    if weights and all(shards) and len(stems) == 1:
        stem, count = stems.pop()
        expected = [f"{stem}-{part:05d}-of-{count:05d}.safetensors" for part in range(1, count + 1)]
        missing = [name for name in expected if name not in weights]
        if missing or len(weights) != count:
            what = f"misses {missing[0]}" if missing else f"has more than {count} shards"
            raise CheckpointError(f"{folder}: {what} (incomplete download?)")
        return _from_files(folder, str(folder), [folder / name for name in expected], None)
    if weights:
        raise CheckpointError(
            f"{folder}: holds {len(weights)} safetensors files and no {INDEX} ({', '.join(weights[:4])}): "
            "give the file to use"
        )
    if ADAPTER_CONFIG in names:
        raise CheckpointError(
            f"{folder}: is a PEFT adapter, not a model: use it as an adapter of its base model"
        )
    pickles = [
        folder / name for name in names if Path(name).suffix in _PICKLES and not _NOT_WEIGHTS.search(name)
    ]
    if pickles:
        raise pickle_error(folder, pickles)
    if any(name.endswith(".gguf") for name in names):
        raise _gguf_error(folder)
    raise CheckpointError(f"{folder}: holds no safetensors file")


def _read_index(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """Returns the shards of an index, in the order of their names, and the shard of each tensor."""
    index = read_json_object(path, limit=100_000_000)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: must have a non-empty weight_map")
    where: dict[str, Path] = {}
    for name, file in weight_map.items():
        # A name, never a path: an index must not reach outside its folder. (The file itself may be a link,
        # as in the hub's cache.)
        if (
            not isinstance(file, str)
            or not file.endswith(".safetensors")
            or file.startswith(".")
            or len(file) > 255
            or any(character in file for character in "/\\:\0")
        ):
            raise CheckpointError(f"{path}: tensor {name!r} must lie in a file of this folder, got {file!r}")
        where[name] = path.parent / file
    files = sorted(set(where.values()))
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"{path}: names the shard {file.name}, which does not exist (incomplete download?)"
            )
    return files, where


def _from_files(folder: Path, source: str, files: list[Path], where: dict[str, Path] | None) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file)[0].items():
            if name in tensors:
                raise CheckpointError(f"{source}: tensor {name!r} is in {tensors[name].file} and in {file}")
            if where is not None and where.get(name) != file:
                listed = where.get(name)
                place = f"lists it in {listed.name}" if listed else "does not list it"
                raise CheckpointError(f"{source}: tensor {name!r} is in {file.name}, but the index {place}")
            tensors[name] = info
    if where is not None:
        for name, file in where.items():
            if name not in tensors:
                raise CheckpointError(
                    f"{source}: tensor {name!r} is not in {file.name}, where the index lists it"
                )
    if not tensors:
        raise CheckpointError(f"{source}: holds no tensor")
    config_path = folder / CONFIG
    config = read_json_object(config_path, allow_nan=True) if config_path.exists() else None
    _refuse_quantised(source, config, tensors)
    return Checkpoint(
        source, tensors, path=Path(source), config=config, files=files, tied=_tied_by_config(config, tensors)
    )


def _refuse_quantised(source: str, config: dict[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises unless all weights are plain numbers."""
    configs = [config] if config else []
    configs += [part for part in (config or {}).values() if isinstance(part, dict)]
    method = None
    for part in configs:
        quantisation = part.get("quantization_config")
        if quantisation:
            method = (
                quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
            )
    found = next((info for info in tensors.values() if _looks_quantised(info)), None)
    advice = (
        "merge the original weights instead, or dequantise: load the model with transformers, call "
        "model.dequantize() and save_pretrained() it to a new folder"
    )
    if found is not None:
        kind = f" (quant_method {method!r})" if method else ""
        raise CheckpointError(
            f"{source}: is quantised{kind}: tensor {found.name!r} is "
            f"{str(found.dtype).removeprefix('torch.')}. A merge needs plain floating-point weights: {advice}"
        )
    if method is not None:
        raise CheckpointError(
            f"{source}: config.json says that it is quantised (quant_method {method!r}), its tensors do "
            "not look so. If they are plain weights, remove quantization_config from config.json; "
            f"otherwise {advice}"
        )


def _looks_quantised(info: TensorInfo) -> bool:
    if info.dtype in _QUANTISED_DTYPES or _QUANTISED_NAMES.search(info.name):
        return True
    # MXFP4 experts are stored as …_blocks and …_scales
    packed = info.name.endswith((".weight", "_blocks", "_scales"))
    return packed and info.dtype in _PACKED_DTYPES and len(info.shape) >= 2


def _tied_by_config(
    config: dict[str, Any] | None, tensors: Mapping[str, TensorInfo]
) -> list[tuple[str, ...]]:
    """Groups the embeddings that config.json declares to be one tensor although the files hold both."""
    parts = [config or {}, (config or {}).get("text_config")]
    if not any(isinstance(part, dict) and part.get("tie_word_embeddings") is True for part in parts):
        return []
    outputs = [name for name in tensors if _OUTPUT_EMBEDDINGS.fullmatch(name)]
    inputs = [name for name in tensors if _INPUT_EMBEDDINGS.fullmatch(name)]
    if len(outputs) != 1 or not inputs:
        return []
    names = [name for name in inputs if tensors[name].shape == tensors[outputs[0]].shape]
    return [(*names, outputs[0])] if names else []


def _gguf_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: GGUF files are (mostly) quantised; use the safetensors checkpoint they were made from, "
        "or convert: AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).save_pretrained(new_folder)"
    )
