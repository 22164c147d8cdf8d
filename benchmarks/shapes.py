"""Shapes of real layers, (out, in) as PyTorch stores them, and of the cores of eight tasks."""

TASKS = 8

LAYERS = {
    "MiniLM attention": (384, 384),
    "MiniLM MLP": (1536, 384),
    "ViT-B MLP": (3072, 768),
    "ViT-L MLP": (4096, 1024),
    "LLaMA-7B attention": (4096, 4096),
    "LLaMA-7B MLP": (4096, 11008),
}

# K of the K × K coordinate matrices: T · r for adapters of rank r, T · ⌊p / T⌋ for full fine-tunes.
CORES = {
    "adapters, r = 16": 128,
    "MiniLM": 384,
    "ViT-L": 1024,
    "LLaMA-7B attention": 4096,
}

ADAPTER_RANKS = (16, 128, 512)
