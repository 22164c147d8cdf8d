"""Collects what does not fit together and words it as one error, with the recipe line that resolves each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dirmerge.errors import MismatchError
from dirmerge.planning.names import layer_pattern


@dataclass
class Problems:
    """The problems of one plan.

    Attributes:
        tensors: (name, what is wrong, the rules that resolve it) in the order found. A rule is one of the
            recipe's, `take` with the number of the model after a colon.
        general: sentences about no tensor in particular.
    """

    tensors: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    general: list[str] = field(default_factory=list)

    def add(self, name: str, text: str, *rules: str) -> None:
        """Adds a tensor that does not fit, with the rules that would resolve it."""
        self.tensors.append((name, text, rules))

    def raise_if_any(self, origin: str, names: Sequence[str]) -> None:
        """Raises MismatchError with all problems.

        Args:
            origin: the recipe's file.
            names: of all tensors, so that a glob is only proposed where it fits no other tensor.
        """
        count = len(self.tensors) + len(self.general)
        if not count:
            return
        grouped: dict[tuple[str, str, tuple[str, ...]], list[str]] = defaultdict(list)
        for name, text, rules in self.tensors:
            grouped[layer_pattern(name), text, rules].append(name)
        fitting = Counter(layer_pattern(name) for name in names)
        lines = list(self.general)
        for (pattern, text, rules), members in grouped.items():
            whole = len(members) > 1 and fitting[pattern] == len(members)
            shown = [f"{pattern} ({len(members)} tensors)"] if whole else members
            lines += [f"{title} {text}" for title in shown]
            matches = [pattern] if whole else members
            lines.append("  to resolve it:" if len(rules) == 1 else "  to resolve it, one of:")
            lines += [f"    {_rule_line(matches, rule)}" for rule in rules]
        noun = "problem" if count == 1 else "problems"
        raise MismatchError(
            f"{origin}: the inputs do not fit together, {count} {noun} (the lines that resolve them go under "
            "`tensors:`):\n  " + "\n  ".join(lines)
        )


def _rule_line(matches: Sequence[str], rule: str) -> str:
    name, _, model = rule.partition(":")
    match = f'"{matches[0]}"' if len(matches) == 1 else "[" + ", ".join(f'"{m}"' for m in matches) + "]"
    return f"- {{match: {match}, rule: {name}" + (f", model: {model}}}" if model else "}")
