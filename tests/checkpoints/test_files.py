"""JSON files: bounded in size, and parsed strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from dirmerge.checkpoints.files import parse_json_object, read_json_object
from dirmerge.errors import CheckpointError


class TestJson:
    def test_limit(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"a": "' + "x" * 100 + '"}')
        assert read_json_object(tmp_path / "config.json")["a"] == "x" * 100
        with pytest.raises(CheckpointError, match=r"config\.json: larger than 50 bytes"):
            read_json_object(tmp_path / "config.json", limit=50)

    def test_infinity_only_where_allowed(self) -> None:
        # Mamba2's config.json has "time_step_limit": [0.0, Infinity]
        assert parse_json_object(b'{"a": Infinity}', "x", allow_nan=True) == {"a": float("inf")}
        with pytest.raises(CheckpointError, match="Infinity is not a JSON value"):
            parse_json_object(b'{"a": Infinity}', "x")

    def test_nested_duplicates(self) -> None:
        with pytest.raises(CheckpointError, match="'b' occurs twice"):
            parse_json_object(b'{"a": {"b": 1, "c": 2, "b": 3}}', "x")
