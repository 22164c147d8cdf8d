"""Names of models: local paths first, then the hub, from which no pickle comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from dirmerge.checkpoints.hub import resolve
from dirmerge.errors import CheckpointError


class TestResolve:
    def test_local_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "org").mkdir()
        (tmp_path / "org" / "name").mkdir()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
        assert resolve("org/name") == Path("org/name")
        assert resolve(str(tmp_path)) == tmp_path
        monkeypatch.setenv("HOME", str(tmp_path))
        assert resolve("~/org") == tmp_path / "org"

    def test_hub_download_brings_no_pickle(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[str, dict[str, Any]]] = []

        def download(repo: str, **options: Any) -> str:
            calls.append((repo, options))
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert resolve("some-org/some.name@refs/pr/1") == tmp_path
        assert resolve("some-org/some.name") == tmp_path
        assert [(repo, options["revision"]) for repo, options in calls] == [
            ("some-org/some.name", "refs/pr/1"),
            ("some-org/some.name", None),
        ]
        options = calls[0][1]
        wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
        wanted += ["tokenizer.model", "modeling_x.py", "merges.txt", "chat_template.jinja", "LICENSE"]
        wanted += ["adapter_model.safetensors", "adapter_config.json"]
        unwanted = ["pytorch_model.bin", "tf_model.h5", "model.gguf", "consolidated.safetensors"]
        unwanted += ["original/consolidated.00.pth", "onnx/model.safetensors"]
        chosen = huggingface_hub.utils.filter_repo_objects(  # type: ignore[attr-defined]
            wanted + unwanted,
            allow_patterns=options["allow_patterns"],
            ignore_patterns=options["ignore_patterns"],
        )
        assert list(chosen) == wanted

    def test_offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(
            CheckpointError, match=r"org/name: no such file .*cannot be reached.*hf download org/name"
        ):
            resolve("org/name")

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (lambda: LocalEntryNotFoundError("no"), "cannot be reached"),
            (lambda: ConnectionError("refused"), "the hub answers: refused"),
            (
                lambda: RepositoryNotFoundError(
                    "404\nmore", response=type("R", (), {"headers": {}, "request": None})()
                ),
                "the hub answers: 404$",
            ),
        ],
    )
    def test_hub_errors(
        self, error: Callable[[], Exception], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, **options: Any) -> str:
            raise error()

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(CheckpointError, match=message):
            resolve("org/name")

    @pytest.mark.parametrize(
        "source", ["missing", "./org/name", "/a/b", "a/b/c", "org/name@", "-a/b", "../x"]
    )
    def test_neither_path_nor_hub_id(self, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
        with pytest.raises(CheckpointError, match="not a hub id of the form"):
            resolve(source)
