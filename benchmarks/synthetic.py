"""Synthetic checkpoints: Llama-shaped models, LoRA adapters, and checks of their merges in float64."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dirmerge.checkpoints.files import write_json
from dirmerge.checkpoints.reader import Checkpoint, open_checkpoint
from dirmerge.checkpoints.safetensors_writer import SafetensorsFileWriter
from dirmerge.checkpoints.shards import ShardedWriter

DTYPE = torch.bfloat16
WEIGHT_STD = 0.02
NOISE_STD = 0.002
"""Standard deviation of W_t − W_0: a tenth of the weights', so that most of it survives bfloat16."""
SHARD_SIZE = 500 * 10**6
SCALE = 0.4
DENSITY = 0.2
ADAPTER_RANK = 16

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama-shaped model with tied embeddings."""

    layers: int
    hidden: int = 2048
    intermediate: int = 5632
    vocabulary: int = 32000

    def projections(self) -> Shapes:
        """The matrices of one layer, (out, in)."""
        h, i = self.hidden, self.intermediate
        attention = {f"self_attn.{x}_proj": (h, h) for x in "qkvo"}
        return {**attention, "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}

    def shapes(self) -> Shapes:
        """Every tensor of the checkpoint, as transformers names them."""
        found: Shapes = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for module, shape in self.projections().items():
                found[f"{prefix}.{module}.weight"] = shape
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{prefix}.{norm}.weight"] = (self.hidden,)
        return {**found, "model.norm.weight": (self.hidden,)}

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def config(self) -> dict[str, object]:
        """The config.json of such a model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(1, self.hidden // 128),
            "num_key_value_heads": max(1, self.hidden // 128),
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }


def write_models(folder: Path, llama: Llama, tasks: int, seed: int = 0) -> list[Path]:
    """Writes a base and its fine-tunes W_t = W_0 + noise, sharded, one tensor in memory at a time.

    Args:
        folder: where the models' folders go.
        llama: the sizes.
        tasks: number T of fine-tunes.
        seed: of all values.

    Returns:
        The T + 1 folders, the base first.
    """
    folders = [folder / name for name in ("base", *(f"task-{t}" for t in range(tasks)))]
    generator = torch.Generator().manual_seed(seed)
    entries = [(name, DTYPE, shape) for name, shape in llama.shapes().items()]
    with contextlib.ExitStack() as stack:
        writers = []
        for path in folders:
            path.mkdir(parents=True)
            write_json(path / "config.json", llama.config())
            writers.append(stack.enter_context(ShardedWriter(path, entries, SHARD_SIZE)))
        for name, _, shape in entries:
            base = torch.randn(shape, generator=generator) * WEIGHT_STD
            writers[0].write(name, base.to(DTYPE))
            for writer in writers[1:]:
                noise = torch.randn(shape, generator=generator)
                writer.write(name, noise.mul_(NOISE_STD).add_(base).to(DTYPE))
    return folders


def write_adapters(folder: Path, llama: Llama, tasks: int, seed: int = 0) -> list[Path]:
    """Writes LoRA adapters of every projection, and returns their folders."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "synthetic",
        "r": ADAPTER_RANK,
        "lora_alpha": ADAPTER_RANK,
        "bias": "none",
        "target_modules": sorted(name.split(".")[-1] for name in llama.projections()),
    }
    shapes: Shapes = {}
    for layer in range(llama.layers):
        for module, (m, n) in llama.projections().items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            shapes[f"{prefix}.lora_A.weight"] = (ADAPTER_RANK, n)
            shapes[f"{prefix}.lora_B.weight"] = (m, ADAPTER_RANK)
    entries = [(name, DTYPE, shape) for name, shape in shapes.items()]
    generator = torch.Generator().manual_seed(seed)
    folders = [folder / f"adapter-{t}" for t in range(tasks)]
    for path in folders:
        path.mkdir(parents=True)
        write_json(path / "adapter_config.json", config)
        file = path / "adapter_model.safetensors"
        with SafetensorsFileWriter(file, entries, {"format": "pt"}) as writer:
            for name, shape in shapes.items():
                writer.write(name, (torch.randn(shape, generator=generator) * 0.01).to(DTYPE))
    return folders


def write_many(folder: Path, count: int) -> list[Path]:
    """Writes models of three tiny tensors each, and returns their folders, the base first."""
    entries = [(f"layer.{i}.weight", DTYPE, (8, 8)) for i in range(3)]
    generator = torch.Generator().manual_seed(0)
    folders = [folder / f"model-{t:03d}" for t in range(count + 1)]
    for path in folders:
        path.mkdir(parents=True)
        write_json(path / "config.json", {})
        with ShardedWriter(path, entries) as writer:
            for name, _, shape in entries:
                writer.write(name, (torch.randn(shape, generator=generator) * WEIGHT_STD).to(DTYPE))
    return folders


def write_recipe(path: Path, method: str, base: Path | None, models: Sequence[Path]) -> Path:
    """Writes a recipe that dirmerge and mergekit read alike (JSON is YAML), and returns its path."""
    recipe: dict[str, object] = {"merge_method": method}
    if base is not None:
        recipe["base_model"] = str(base)
    recipe["models"] = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    if method != "average":
        density = {"density": DENSITY, "normalize": True} if method == "ties" else {}
        recipe["parameters"] = {"lambda": SCALE, **density}
    if base is not None:
        recipe["dtype"] = "bfloat16"
    path.write_text(json.dumps(recipe, indent=1) + "\n")
    return path


def merged_update(method: str, deltas: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    """Computes the merged update D in float64, by the formulas of the methods' papers.

    task_arithmetic: Σ D_t. average: Σ D_t / T. ties: entries below a task's threshold are zero, the sign of
    the sum is elected, and the entries that have it are averaged.
    """
    stack = torch.stack(list(deltas))
    if method == "task_arithmetic":
        return stack.sum(0)
    if method == "average":
        return stack.mean(0)
    for delta, threshold in zip(stack, thresholds, strict=True):
        delta[delta.abs() < threshold] = 0
    chosen = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
    return (stack * chosen).sum(0) / chosen.sum(0).clamp(min=1)


def ties_threshold(delta: Tensor, density: float = DENSITY) -> float:
    """The k-th largest magnitude of a delta, k = max(1, ⌊density · entries⌋)."""
    magnitudes = delta.abs().flatten().numpy()
    k = max(1, math.floor(density * magnitudes.size))
    magnitudes.partition(magnitudes.size - k)
    return float(magnitudes[magnitudes.size - k])


def rounding_excess(found: Tensor, truth: Tensor, inputs: Tensor) -> float:
    """How far stored values are from float64 ones, in roundings to bfloat16; correct ones are at most 1.

    Args:
        found: bfloat16 values of an output.
        truth: their float64 values before rounding.
        inputs: sums of the magnitudes that were added; float32 arithmetic may lose 2^-21 of them.
    """
    half_ulp = torch.ldexp((truth != 0).double(), torch.frexp(truth).exponent - 9)
    allowed = half_ulp + inputs * 2.0**-21 + torch.finfo(torch.float64).tiny
    excess = (found.double() - truth).abs() / allowed
    return float(excess.nan_to_num(nan=math.inf).max())


def sample_names(names: Sequence[str]) -> list[str]:
    """The tensors outside the layers, and those of the first and of the last layer."""
    layers = {int(name.split(".")[2]) for name in names if ".layers." in name}
    ends = {f".layers.{layer}." for layer in (min(layers), max(layers))} if layers else set()
    return [name for name in names if ".layers." not in name or any(end in name for end in ends)]


def sample_rows(rows: int) -> list[int]:
    """The first and the last row and six between."""
    return sorted({round(i * (rows - 1) / 7) for i in range(8)})


def check_models(method: str, folders: Sequence[Path], out: Path) -> float:
    """Compares rows of a merged model with the formula in float64.

    Args:
        method: task_arithmetic, average or ties.
        folders: the base and the fine-tunes.
        out: the merged model.

    Returns:
        The largest error in roundings of bfloat16.

    Raises:
        SystemExit: a tensor is missing, or an error exceeds one rounding.
    """
    with contextlib.ExitStack() as stack:
        *inputs, output = (stack.enter_context(open_checkpoint(path)) for path in (*folders, out))
        missing = inputs[0].tensors.keys() ^ output.tensors.keys()
        if missing:
            raise SystemExit(f"{method}: {len(missing)} tensors differ by name, such as {min(missing)}")
        names = sample_names(list(inputs[0].tensors))
        worst, where = max((_check_tensor(method, name, inputs, output), name) for name in names)
    if worst > 1:
        raise SystemExit(f"{method}: {where} is {worst:.3g} roundings from the formula in float64")
    return worst


def _check_tensor(method: str, name: str, inputs: Sequence[Checkpoint], output: Checkpoint) -> float:
    rows = sample_rows(output.tensors[name].shape[0])
    base = inputs[0].read(name).double()
    deltas, thresholds = [], []
    for checkpoint in inputs[1:]:
        delta = checkpoint.read(name).double().sub_(base)
        deltas.append(delta[rows])
        thresholds.append(ties_threshold(delta) if method == "ties" else 0.0)
        del delta
    scale = 1.0 if method == "average" else SCALE
    magnitudes = base[rows].abs() + scale * torch.stack(deltas).abs().sum(0)
    truth = base[rows] + scale * merged_update(method, deltas, thresholds)
    return rounding_excess(output.read(name)[rows], truth, magnitudes)


def check_adapter(folders: Sequence[Path], out: Path) -> float:
    """Compares rows of the sum of adapters, λ Σ B_t A_t, with float64.

    Returns:
        The largest relative error of a module's rows in the Frobenius norm.

    Raises:
        SystemExit: an error exceeds 2^-7, two roundings of the factors to bfloat16.
    """
    config = json.loads((out / "adapter_config.json").read_text())
    factor = config["lora_alpha"] / config["r"]
    with contextlib.ExitStack() as stack:
        *inputs, output = (
            stack.enter_context(open_checkpoint(path / "adapter_model.safetensors"))
            for path in (*folders, out)
        )
        worst = 0.0
        suffix = ".lora_B.weight"
        modules = [name.removesuffix(suffix) for name in inputs[0].tensors if name.endswith(suffix)]
        for module in (modules[0], modules[len(modules) // 2], modules[-1]):
            rows = sample_rows(inputs[0].tensors[module + suffix].shape[0])
            products = [
                c.read(module + suffix)[rows].double() @ c.read(f"{module}.lora_A.weight").double()
                for c in (*inputs, output)
            ]
            truth = SCALE * torch.stack(products[:-1]).sum(0)
            worst = max(worst, float((factor * products[-1] - truth).norm() / truth.norm()))
    if not worst <= 2**-7:
        raise SystemExit(f"adapters: {worst:.3g} from the sum in float64, relative to its norm")
    return worst


def difference(base: Path, one: Path, other: Path) -> float:
    """The distance of two merged models relative to the update of the first, in the Frobenius norm."""
    apart = size = 0.0
    with contextlib.ExitStack() as stack:
        w0, a, b = (stack.enter_context(open_checkpoint(path)) for path in (base, one, other))
        for name in a.tensors:
            value = a.read(name).float()
            apart += float((b.read(name).float() - value).double().square().sum())
            size += float((value - w0.read(name).float()).double().square().sum())
    return math.sqrt(apart / size)
