"""Shapes of real layers, (out, in) as PyTorch stores them, and of the coordinate matrices of eight tasks."""

from __future__ import annotations

from dataclasses import dataclass

TASKS = 8
ADAPTER_RANK = 16


@dataclass(frozen=True)
class Layer:
    """One kind of weight of a model: m × n, and how many of its shape every block of the model has."""

    family: str
    name: str
    m: int
    n: int
    per_block: int

    def __str__(self) -> str:
        return f"{self.family} {self.name} {self.m}×{self.n}"


@dataclass(frozen=True)
class Core:
    """K of the K × K coordinate matrices: T · r for adapters, T · ⌊p / T⌋ for full fine-tunes."""

    family: str
    K: int

    def __str__(self) -> str:
        return f"{self.family} {self.K}×{self.K}"


# Blocks per model, then the weights of one block. MiniLM: L6-H384; ViT: CLIP's image encoders.
BLOCKS = {"minilm": 6, "vit-b": 12, "vit-l": 24, "llama7b": 32}
MODELS = {
    "minilm": (
        Layer("minilm", "attention", 384, 384, 4),
        Layer("minilm", "mlp", 1536, 384, 1),
        Layer("minilm", "mlp down", 384, 1536, 1),
    ),
    "vit-b": (
        Layer("vit-b", "attention", 768, 768, 4),
        Layer("vit-b", "mlp", 3072, 768, 1),
        Layer("vit-b", "mlp down", 768, 3072, 1),
    ),
    "vit-l": (
        Layer("vit-l", "attention", 1024, 1024, 4),
        Layer("vit-l", "mlp", 4096, 1024, 1),
        Layer("vit-l", "mlp down", 1024, 4096, 1),
    ),
    "llama7b": (
        Layer("llama7b", "attention", 4096, 4096, 4),
        Layer("llama7b", "mlp", 11008, 4096, 2),
        Layer("llama7b", "mlp down", 4096, 11008, 1),
    ),
}
# The transposed shape of a model's last layer costs what that of its MLP does, so it is not timed again.
LAYERS = tuple(layer for model in MODELS.values() for layer in model[:2])
CORES = (
    Core("adapters", TASKS * ADAPTER_RANK),
    Core("minilm", 384),
    Core("vit-b", 768),
    Core("vit-l", 1024),
    Core("llama7b", 4096),
)
FAMILIES = ("adapters", *MODELS)
ADAPTER_RANKS = (16, 128, 512)
