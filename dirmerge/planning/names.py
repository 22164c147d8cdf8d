"""What tensor names say: tables of vectors, layers and their depth, a prefix between two spellings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

# Tables of vectors: a row belongs to a token or a position, and their row space is no feature space.
_TABLE = re.compile(r"embed|^wte$|^wpe$|^shared$|^lm_head$|^output_projection$|relative|rel_pos|position")
_EXPERTS = re.compile(r"(^|[._])experts?([._]|$)")


def is_table(name: str, shape: Sequence[int], config: Mapping[str, Any] | None) -> str | None:
    """Returns why a weight is a table of vectors (embedding, lm_head, relative-bias table …), or None."""
    parts = name.split(".")
    leaf = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    if _TABLE.search(leaf):
        return f"default for tables of vectors such as {leaf}"
    for size in _vocabulary_sizes(config):
        if size in shape:
            return f"default for tables of vectors: a side is vocab_size {size}"
    return None


def layer_depths(names: Iterable[str]) -> dict[str, float]:
    """Returns every tensor's relative depth in [0, 1], from the first number in its name; gradients use it.

    Layers of one stack share the prefix before the number. Tensors outside a stack have depth 0 when they are
    embeddings and 1 otherwise, as they come before and after the layers.
    """
    found: dict[str, tuple[str, int]] = {}
    last: dict[str, int] = defaultdict(int)
    names = list(names)
    for name in names:
        match = re.match(r"(.*?[A-Za-z_]\w*)\.(\d+)\.", name)
        if match:
            found[name] = (match[1], int(match[2]))
            last[match[1]] = max(last[match[1]], int(match[2]))
    depths = {}
    for name in names:
        if name in found and last[found[name][0]] > 0:
            prefix, index = found[name]
            depths[name] = index / last[prefix]
        else:
            depths[name] = 0.0 if "embed" in name or re.search(r"(^|\.)(wte|wpe|shared)\.", name) else 1.0
    return depths


def common_prefix(names: Collection[str], known: Collection[str]) -> tuple[str, str] | None:
    """Returns the one (strip, add) such that add + (name without strip) is known for every name, or None."""
    if not names or all(name in known for name in names):
        return "", ""
    first = min(names)
    candidates = {("", other[: -len(first)]) for other in known if other.endswith("." + first)}
    parts = first.split(".")
    candidates |= {
        (".".join(parts[:i]) + ".", "") for i in range(1, len(parts)) if ".".join(parts[i:]) in known
    }
    fitting = [
        (strip, add)
        for strip, add in sorted(candidates)
        if all(name.startswith(strip) and add + name[len(strip) :] in known for name in names)
    ]
    return fitting[0] if len(fitting) == 1 else None


def is_expert_stack(name: str, shape: Sequence[int]) -> bool:
    """Returns whether a tensor is a stack of fused expert weights, (experts, m, n)."""
    return len(shape) == 3 and min(shape[1:]) > 1 and _EXPERTS.search(name) is not None


def layer_pattern(name: str) -> str:
    """Returns the name with `*` for every number: a glob that fits the same tensor of all layers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _vocabulary_sizes(config: Mapping[str, Any] | None) -> set[int]:
    """Returns the vocabulary sizes of a config that cannot be mistaken for another of its dimensions."""
    sizes: set[int] = set()
    others: set[int] = set()
    pending: list[Mapping[str, Any]] = [config] if config else []
    while pending:
        for key, value in pending.pop().items():
            if isinstance(value, Mapping):
                pending.append(value)
            elif isinstance(value, int) and not isinstance(value, bool):
                if key == "vocab_size":
                    sizes.add(value)
                elif re.search(r"(size|dim|width|embd|inner|ff|d_model|projection)$", key):
                    others.add(value)
    return {size for size in sizes - others if size > 1}
