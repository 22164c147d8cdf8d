"""The layers of the package: imports point down, never up and never round in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dirmerge

ROOT = Path(dirmerge.__file__).parent

# From the lowest floor to the highest: a module imports from its own floor and from those before it.
LAYERS = [
    "errors",
    "arrays",
    "backends",
    "ops",
    "linalg",
    "deltas",
    "methods",
    "checkpoints",
    "recipe",
    "planning",
    "engine",
    "diagnostics",
    "alignment",
    "api",
    "demo",
    "doctor",
    "cli",
    "__main__",
]
# The package itself names its public functions and imports them on first use.
ROOT_NAMES = {"__version__"}


def layer_of(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[tuple[str, int]]:
    """Returns the modules of dirmerge that a file imports anywhere, with the line."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names if alias.name.startswith("dirmerge.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "dirmerge":
            names = [alias.name for alias in node.names if alias.name not in ROOT_NAMES]
            found |= {(dirmerge._HOME.get(name, f"dirmerge.{name}"), node.lineno) for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dirmerge."):
            found.add((str(node.module), node.lineno))
    return found


def upward(path: Path, module: str) -> list[str]:
    own = LAYERS.index(layer_of(module))
    return [
        f"{module}:{line} imports {target}"
        for target, line in sorted(imports(path))
        if layer_of(target) in LAYERS and LAYERS.index(layer_of(target)) > own
    ]


def modules() -> list[tuple[Path, str]]:
    files = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]
    return [(path, ".".join(("dirmerge", *path.relative_to(ROOT).with_suffix("").parts))) for path in files]


@pytest.mark.parametrize(("path", "module"), modules(), ids=lambda value: str(value).rpartition("/")[2])
def test_nothing_imports_upwards(path: Path, module: str) -> None:
    assert layer_of(module) in LAYERS, f"{module} has no layer: add it to LAYERS"
    assert upward(path, module) == []


def test_an_upward_import_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "tasks.py"
    file.write_text(
        "def f():\n    from dirmerge.engine.work import matrices\n    from dirmerge import merge\n"
    )
    assert upward(file, "dirmerge.methods.tasks") == [
        "dirmerge.methods.tasks:3 imports dirmerge.api",
        "dirmerge.methods.tasks:2 imports dirmerge.engine.work",
    ]
