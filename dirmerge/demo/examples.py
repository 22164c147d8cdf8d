"""Examples and tasks of text classification, and how examples are split."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from dirmerge.demo.sources import SourceError

TRAIN, VALIDATION, TEST = 4000, 500, 1000  # at most so many texts per split


@dataclass(frozen=True)
class Example:
    """A text, its class, and the group that must stay within one split."""

    text: str
    label: str
    group: str


@dataclass(frozen=True)
class TaskData:
    """A prepared task: prompts[c] describes class c; each split is a list of (text, class index)."""

    name: str
    classes: list[str]
    prompts: list[str]
    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]
    test: list[tuple[str, int]]

    def to_json(self) -> str:
        """Returns the canonical JSON text of the task, which its pinned hash covers."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> TaskData:
        """Returns the task that `to_json` wrote."""
        fields = json.loads(text)
        for split in ("train", "validation", "test"):
            fields[split] = [(text, label) for text, label in fields[split]]
        return cls(**fields)


def split(
    name: str, examples: Iterable[Example], prompts: Mapping[str, str], *, per_class: int | None = None
) -> TaskData:
    """Cleans, balances and splits the examples of a task, by group.

    White space is collapsed; texts equal up to case count once, and not at all if their classes differ. All
    orders are those of sha256("task:purpose:text"): they need no random generator and never change. Within
    each class, groups go to test until it has its share of min(1000, a fifth), then to validation (500, an
    eighth of the rest), then to train.

    Args:
        name: the task's name, the seed of the order.
        examples: the raw examples.
        prompts: the description of every class; the classes are numbered in the sorted order of their names.
        per_class: at most so many texts of each class.

    Raises:
        SourceError: a class has no text in one of the splits.
    """
    kept: dict[str, Example | None] = {}
    for example in examples:
        text = " ".join(example.text.split())
        if len(text) < 2:
            continue
        key = text.lower()
        other = kept.get(key)
        if key not in kept:
            kept[key] = Example(text, example.label, example.group)
        elif other is not None and other.label != example.label:
            kept[key] = None
    ordered = sorted((e for e in kept.values() if e is not None), key=lambda e: _order(name, "pick", e.text))
    if per_class is not None:
        count: Counter[str] = Counter()
        balanced = []
        for example in ordered:
            if count[example.label] < per_class:
                count[example.label] += 1
                balanced.append(example)
        ordered = balanced
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in ordered:
        groups[example.group].append(example)

    classes = sorted(prompts)
    index = {label: i for i, label in enumerate(classes)}
    total = len(ordered)
    want_test = min(TEST, total // 5)
    want_validation = min(VALIDATION, (total - want_test) // 8)
    splits: dict[str, list[Example]] = {"test": [], "validation": [], "train": []}
    by_label: dict[str, list[str]] = defaultdict(list)
    for group in sorted(groups, key=lambda g: _order(name, "group", g)):
        by_label[Counter(example.label for example in groups[group]).most_common(1)[0][0]].append(group)
    for names in by_label.values():
        size = sum(len(groups[group]) for group in names)
        taken = Counter({"test": 0, "validation": 0})
        for left, group in zip(range(len(names), 0, -1), names, strict=True):
            # A class of few groups keeps one for each later split.
            if taken["test"] * total < size * want_test and (not taken["test"] or left > 2):
                target = "test"
            elif taken["validation"] * total < size * want_validation and (
                not taken["validation"] or left > 1
            ):
                target = "validation"
            else:
                target = "train"
            splits[target] += groups[group]
            taken[target] += len(groups[group])
    # A group is taken whole, so a split can exceed its size. The order that cuts it must be another one than
    # those that chose texts and groups, or the first texts of a split would not be a random sample of it.
    sizes = {"train": TRAIN, "validation": want_validation, "test": want_test}
    pairs = {}
    for key, chosen in splits.items():
        chosen.sort(key=lambda e: _order(name, "order", e.text))
        pairs[key] = [(e.text, index[e.label]) for e in chosen[: sizes[key]]]
        absent = set(range(len(classes))) - {label for _, label in pairs[key]}
        if absent:
            raise SourceError(
                f"task {name}: no {key} text for {', '.join(classes[i] for i in sorted(absent))}"
            )
    return TaskData(name, classes, [prompts[c] for c in classes], **pairs)


def _order(name: str, purpose: str, key: str) -> bytes:
    return hashlib.sha256(f"{name}:{purpose}:{key}".encode()).digest()
