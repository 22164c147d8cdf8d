"""Fixtures of every test: poisoned memory, seeds, one implementation of an op after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from shadow import Shadow, guard

import dirmerge.ops  # noqa: F401  fills the backend table
from dirmerge import backends

# Makes torch fill `empty` with NaN: a kernel that leaves an entry unwritten cannot pass by luck.
torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _skip_if_missing(name: str) -> None:
    info = backends.native_build_info()
    if name == "native" and isinstance(info, str):
        pytest.skip(info)


@pytest.fixture(scope="session")
def shadow_gpu() -> type[Shadow]:
    """The class Shadow, once its guard is built; required in CI, skipped with the reason elsewhere."""
    try:
        guard.load()
    except guard.GuardError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    return Shadow


@pytest.fixture(params=["torch", "native"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once under each backend; native is skipped, with the reason, where it is not built."""
    _skip_if_missing(request.param)
    with backends.backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer BERT and a word-level tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("encoder")
    words = [
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[UNK]",
        *["text", "of", "good", "bad", "news"],
        *(str(i) for i in range(60)),
    ]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument `dtype_of_backend` runs for every backend × dtype that its module's OP has."""
    if "dtype_of_backend" in metafunc.fixturenames:
        pairs = [
            (name, dtype)
            for name, found in backends.implementations(metafunc.module.OP, "cpu").items()
            # Triton's have tests of their own, which need an interpreter or a GPU.
            if name != "triton"
            for dtype in backends.FLOATING
            if found.dtypes is None or dtype in found.dtypes
        ]
        ids = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in pairs]
        metafunc.parametrize("dtype_of_backend", pairs, ids=ids, indirect=True)


@pytest.fixture
def dtype_of_backend(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The dtype to test, with its backend forced."""
    name, dtype = request.param
    _skip_if_missing(name)
    with backends.backend(name):
        yield dtype
