"""Eight more tasks from Debian packages, downloaded by apt-get, unpacked by dpkg-deb; nothing is installed.

| task | texts | package | licence |
|---|---|---|---|
| wordnet | gloss of a noun → its lexicographer file | wordnet-base | WordNet |
| gcide | definition → part of speech | dict-gcide | GPL-2+ |
| bible | verse of the King James Bible → group of books | bible-kjv, bible-kjv-text | GPL-2+ |
| debian | one-line description → archive section | the package lists of the machine | metadata |
| foldoc | definition of a computing term → its field | dict-foldoc | GFDL 1.1 or later |
| fortune | epigram or joke → its file | fortunes | BSD-4-Clause; each text's author |
| austen | three lines of a novel → which of six | r-cran-janeaustenr | MIT; the novels are public domain |
| trump | tweet until 2016 → the device it was sent from | r-cran-dslabs | Artistic-2.0; the tweets' author |

The packages follow the release of the machine's archive. The sha256 of every prepared task is pinned to what
Debian 12 has, and another one is an error unless it is accepted; numbers of accepted data are comparable
within one machine only. The task debian has no pin: its texts are the package lists that the machine knows at
the time, which change with its sources, its architecture and every update. Results hold the hash of every
task's data, and rows of other data are never added to them.

Splits are by group: the chapter for bible and austen, the source package for debian, the beginning of the
text for foldoc, fortune and trump, which have versions of one text; elsewhere every text is its own group.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import os
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dirmerge.demo.examples import Example, TaskData, split
from dirmerge.demo.sources import SourceError

WORDS = 60  # of a text of foldoc, fortune and trump at most; the encoder reads about 40
LEXICOGRAPHER_FILES = {
    "04": "act or action",
    "05": "animal",
    "06": "man-made artifact",
    "07": "attribute of people or objects",
    "08": "body part",
    "09": "cognition or thought",
    "10": "communication",
    "11": "event",
    "12": "feeling or emotion",
    "13": "food or drink",
    "14": "group of people or things",
    "15": "location or place",
    "17": "natural object",
    "18": "person",
    "19": "natural phenomenon",
    "20": "plant",
    "21": "possession or money",
    "22": "natural process",
    "23": "quantity or unit of measure",
    "25": "shape",
    "26": "state or condition",
    "27": "substance",
    "28": "time or period",
}
PARTS_OF_SPEECH = {
    "n.": "noun: a thing, person or idea",
    "a.": "adjective: describing a quality",
    "v. t.": "transitive verb: to do something to an object",
    "adv.": "adverb: describing manner",
    "v. i.": "intransitive verb: to act",
}
# Beginnings of the book names that the program `bible` prints.
BOOKS = {
    "law of Moses": "Ge Ex Le Nu De",
    "history of Israel and its kings": "Jos Jdg Ru 1Sm 2Sm 1Ki 2Ki 1Ch 2Ch Ezr Ne Es",
    "wisdom and proverbs": "Job Pr Ec So SS",
    "psalms of praise": "Ps",
    "prophets": "Is Jer La Eze Da Ho Joel Am Ob Jon Mic Na Hab Zep Hag Zec Mal",
    "gospels about Jesus": "Mat Mar Lu Joh",
    "letters of the apostles": "Ro 1Co 2Co Ga Ep Ph Col 1Th 2Th 1Ti 2Ti Ti Heb Jas 1Pe 2Pe 1Jn 2Jn 3Jn Jude",
}
SECTIONS = {
    "admin": "system administration",
    "database": "databases",
    "devel": "software development",
    "editors": "text editors",
    "electronics": "electronics",
    "fonts": "fonts",
    "games": "games",
    "graphics": "graphics and images",
    "kernel": "kernel modules",
    "localization": "localization and languages",
    "mail": "email",
    "math": "mathematics",
    "net": "network",
    "otherosfs": "file systems of other operating systems",
    "science": "science",
    "sound": "sound and music",
    "text": "text processing",
    "utils": "utilities",
    "video": "video",
    "web": "web",
}


# The sixteen most frequent marks of FOLDOC, without `tool`, which says little about the field.
FIELDS = {
    "body": "an organisation or standards body",
    "character": "a character or punctuation mark",
    "communications": "telecommunications",
    "company": "a company",
    "computer": "a model of computer",
    "database": "databases",
    "hardware": "computer hardware",
    "jargon": "hacker slang",
    "language": "a programming language",
    "mathematics": "mathematics",
    "messaging": "electronic mail and messages",
    "networking": "computer networks",
    "operating system": "operating systems",
    "processor": "a microprocessor",
    "programming": "programming",
    "storage": "disks and data storage",
}
FORTUNES = {
    "art": "humour about art, music and theatre",
    "computers": "humour about computers and programming",
    "definitions": "a humorous definition, law or rule",
    "education": "humour about school and university",
    "food": "humour about food",
    "knghtbrd": "chat and jokes of Debian developers",
    "law": "humour about law and lawyers",
    "perl": "a remark of Larry Wall on Perl",
    "politics": "humour about politics and war",
    "science": "humour about science",
    "songs-poems": "lyrics of a song or a poem",
    "startrek": "a quotation from Star Trek",
    "work": "humour about work and the office",
    "zippy": "absurd words of Zippy the Pinhead",
}
NOVELS = {
    "emma": "Emma",
    "mansfieldpark": "Mansfield Park",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
    "prideprejudice": "Pride and Prejudice",
    "sensesensibility": "Sense and Sensibility",
}
DEVICES = {"Twitter for Android": "an Android phone", "Twitter for iPhone": "an iPhone"}
TWEETS_END = 1483228800  # 2017-01-01: later, nearly all tweets come from one device


def unpack(cache: Path, package: str) -> Path:
    """The folder of an unpacked package, downloaded on first use.

    Raises:
        RuntimeError: apt-get or dpkg-deb failed.
    """
    folder = cache / "debian" / package
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="debian-") as staging:
            _run(["apt-get", "download", package], cwd=Path(staging))
            tree = Path(staging) / "tree"
            for archive in sorted(Path(staging).glob("*.deb")):
                _run(["dpkg-deb", "-x", str(archive), str(tree)])
            tree.rename(folder)
    return folder


def _run(command: list[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.decode('utf-8', 'replace').strip()}")
    return done.stdout.decode("utf-8", "replace")


def parse_wordnet(text: str) -> list[Example]:
    """Examples of data.noun: the first gloss of every synset in the lexicographer files above."""
    examples = []
    for line in text.splitlines():
        fields = line.split(" ", 2)
        if line.startswith("  ") or fields[1] not in LEXICOGRAPHER_FILES:
            continue
        gloss = line.split(" | ", 1)[1].split(";")[0].strip()
        if len(gloss) > 8:
            examples.append(Example(gloss, fields[1], gloss))
    return examples


def parse_gcide(text: str) -> list[Example]:
    """Examples of the GCIDE in dictd format: the first definition of an entry, five parts of speech."""
    examples = []
    for entry in re.split(r"\n\n(?=[A-Z][^\n\\]*\\)", text):
        start = re.match(r"[^\\\n]*\\[^\\]*\\[^,\n]{0,3},\s*(v\. t\.|v\. i\.|adv\.|n\.|a\.)\s", entry)
        if start is None:
            continue
        body = re.sub(r"\[[^\]]*\]", "", entry[start.end() :])  # etymologies
        body = re.sub(r"^\s*\(.*?\)\s*", "", body, flags=re.DOTALL)  # field marks
        body = re.sub(r"^\s*1\.\s*", "", body).replace("{", "").replace("}", "")
        first = re.split(r"(?<=[a-z)])\.\s|--", " ".join(body.split()))[0]
        if 15 < len(first) < 200:
            examples.append(Example(first, start[1], first))
    return examples


def parse_bible(text: str) -> list[Example]:
    """Examples of `bible -f`: lines `Gen1:1 verse`; the group of a verse is its chapter."""
    prefixes = [(prefix, label) for label, books in BOOKS.items() for prefix in books.split()]
    examples = []
    for line in text.splitlines():
        verse = re.match(r"([1-3]?[A-Za-z]+)(\d+):\d+\s+(.*)", line)
        if verse is None:
            continue
        labels = [label for prefix, label in prefixes if verse[1].startswith(prefix)]
        if labels:
            examples.append(Example(verse[3], labels[0], verse[1] + verse[2]))
    return examples


def parse_packages(text: str) -> list[Example]:
    """Examples of `apt-cache dumpavail`: packages of the sections above, grouped by source package."""
    examples = []
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", stanza, re.MULTILINE))
        description = fields.get("Description", fields.get("Description-en", ""))
        if description and fields.get("Section") in SECTIONS:
            source = (fields.get("Source") or fields["Package"]).split()[0]
            examples.append(Example(description, fields["Section"], source))
    return examples


def parse_foldoc(text: str) -> list[Example]:
    """Examples of FOLDOC in dictd format: the first paragraph after every mark of the fields above.

    A mark `<field, …>` begins a definition or one of its numbered senses. Cross-reference braces, a leading
    pronunciation or parenthesis (mostly the headword written out) and bibliographic brackets go.
    """
    examples = []
    for entry in re.split(r"\n\n(?=\S)", text):
        senses = re.finditer(r"^[ \t]+(?:\d+\.\s+)?<([^<>@]+)>(.*?)(?=\n[ \t]*\n|\Z)", entry, re.M | re.S)
        for sense in senses:
            field = " ".join(sense[1].split(",")[0].split())
            body = re.sub(r"\[[^\]]*\]", "", sense[2])
            body = re.sub(r"^\s*(/[^/\n]+/\s+)?(\([^)]*\))?", "", body).replace("{", "").replace("}", "")
            words = re.sub(r"^\s*1\.\s", "", body).split()
            # FOLDOC has an entry "The country code for …" for every country.
            if field in FIELDS and len(words) > 4 and words[:3] != ["The", "country", "code"]:
                examples.append(_beginning_group(words, field))
    return examples


def parse_fortunes(files: Mapping[str, str]) -> list[Example]:
    """Examples of fortune files by name: texts between lines `%`, without the attribution `-- author`."""
    examples = []
    for name, text in files.items():
        for fortune in re.split(r"^%$", text, flags=re.M):
            body = re.sub(r".\x08", "", fortune).strip()  # overstrikes
            words = re.split(r"(?:^|\n)[ \t]*-- |\s-- (?=[^\n]*\Z)", body)[0].split()
            if len(words) > 3:
                examples.append(_beginning_group(words, name))
    return examples


def parse_novel(name: str, lines: Iterable[str]) -> list[Example]:
    """Examples of a novel: three consecutive lines of a chapter, empty ones skipped."""
    chapter, prose = 0, dict[int, list[str]]()
    for line in map(str.strip, lines):
        if re.fullmatch(r"chapter [ivxl\d]+", line, re.I):
            chapter += 1
        elif re.fullmatch("the end|finis|a note on the text", line, re.I):
            break
        # What precedes the first chapter is the title page; headings of volumes have no lower-case letter.
        elif chapter and re.search("[a-z]", line):
            prose.setdefault(chapter, []).append(line)
    return [
        Example(" ".join(part[i : i + 3]), name, f"{name}:{number}")
        for number, part in prose.items()
        for i in range(0, len(part) - 2, 3)
    ]


def parse_tweets(columns: Mapping[str, list[Any]]) -> list[Example]:
    """Examples of the columns of trump_tweets: no retweets, web addresses replaced by `URL`."""
    wanted = (columns[name] for name in ("text", "source", "is_retweet", "created_at"))
    examples = []
    for text, source, retweet, time in zip(*wanted, strict=True):
        if text is not None and source in DEVICES and not retweet and time < TWEETS_END:
            plain = re.sub(r"https?:\S*", "URL", html.unescape(text))
            examples.append(_beginning_group(plain.split(), source))
    return examples


def _beginning_group(words: list[str], label: str) -> Example:
    """An example of at most WORDS words; its group is its first forty letters, which versions of it share."""
    text = " ".join(words[:WORDS])
    return Example(text, label, re.sub(r"[^a-z]", "", text.lower())[:40] or text)


@dataclass(frozen=True)
class RVector:
    """A vector of R: a list, strings, numbers or truth values. None is a missing string, −2³¹ integer."""

    values: list[Any]
    attributes: dict[str, RVector]

    def named(self) -> dict[str, Any]:
        """The elements by their names.

        Raises:
            SourceError: they have none.
        """
        names = self.attributes.get("names", RVector([], {})).values
        if len(names) != len(self.values):
            raise SourceError(f"R data: {len(self.values)} elements, but {len(names)} names")
        return dict(zip(names, self.values, strict=True))


class _RReader:
    """Reads R's binary serialisation, versions 2 and 3 (R Internals, 1.8): vectors with attributes only."""

    SYMBOL, PAIRLIST, STRING, LOGICAL, INTEGER, REAL, STRINGS, LIST = 1, 2, 9, 10, 13, 14, 16, 19
    NULL, REFERENCE = 254, 255
    HAS_ATTRIBUTES, HAS_TAG, LATIN1 = 0x200, 0x400, 0x4000

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._symbols: list[str] = []

    def read(self) -> RVector:
        if self._take(2) != b"X\n":
            raise SourceError("R data: not in the binary format")
        version = self._integers(3)[0]
        if version not in (2, 3):
            raise SourceError(f"R data: version {version} of the format is unknown")
        if version == 3:
            self._take(self._integers(1)[0])  # the native encoding
        return self._vector()

    def _take(self, count: int) -> bytes:
        taken = self._data[self._position : self._position + max(count, 0)]
        if len(taken) != count:
            raise SourceError("R data: truncated, or a vector of an unknown length")
        self._position += count
        return taken

    def _integers(self, count: int) -> list[int]:
        return list(struct.unpack(f">{max(count, 0)}i", self._take(4 * count)))

    def _vector(self) -> RVector:
        flags = self._integers(1)[0]
        kind = flags & 0xFF
        if kind == self.NULL:
            return RVector([], {})
        if kind not in (self.LOGICAL, self.INTEGER, self.REAL, self.STRINGS, self.LIST):
            raise SourceError(f"R data: no reader for type {kind}")
        length = self._integers(1)[0]
        values: list[Any]
        if kind == self.REAL:
            values = list(struct.unpack(f">{max(length, 0)}d", self._take(8 * length)))
        elif kind == self.STRINGS:
            values = [self._string() for _ in range(length)]
        elif kind == self.LIST:
            values = [self._vector() for _ in range(length)]
        else:
            values = self._integers(length)
        return RVector(values, self._attributes() if flags & self.HAS_ATTRIBUTES else {})

    def _string(self) -> str | None:
        flags, length = self._integers(2)
        if flags & 0xFF != self.STRING:
            raise SourceError(f"R data: type {flags & 0xFF} instead of a string")
        if length == -1:
            return None
        return self._take(length).decode("latin-1" if flags & self.LATIN1 else "utf-8", "replace")

    def _attributes(self) -> dict[str, RVector]:
        found = {}
        while (flags := self._integers(1)[0]) & 0xFF == self.PAIRLIST and flags & self.HAS_TAG:
            name = self._symbol()
            found[name] = self._vector()
        if flags & 0xFF != self.NULL:
            raise SourceError(f"R data: type {flags & 0xFF} in the attributes")
        return found

    def _symbol(self) -> str:
        flags = self._integers(1)[0]
        if flags & 0xFF == self.SYMBOL:
            self._symbols.append(self._string() or "")
            return self._symbols[-1]
        index = (flags >> 8) - 1
        if flags & 0xFF != self.REFERENCE or not 0 <= index < len(self._symbols):
            raise SourceError(f"R data: type {flags & 0xFF} instead of a symbol")
        return self._symbols[index]


def read_r(data: bytes) -> RVector:
    """The vector that R serialised.

    Raises:
        SourceError: the data is malformed or holds anything but vectors.
    """
    return _RReader(data).read()


def read_lazy(database: Path, name: str) -> RVector:
    """A variable of an R package's lazy-load database, the files `database`.rdx and .rdb.

    Raises:
        SourceError: there is no such variable, or it is not a vector compressed by zlib.
    """
    try:
        index = read_r(gzip.decompress(database.with_suffix(".rdx").read_bytes())).named()
        offset, length = index["variables"].named()[name].values
        with database.with_suffix(".rdb").open("rb") as file:
            file.seek(offset)
            stored = file.read(length)
        return read_r(zlib.decompress(stored[4:]))  # four bytes of length come first
    except (KeyError, ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceError(f"{database.name}: cannot read the variable {name}: {error!r}") from error


def _wordnet(cache: Path) -> list[Example]:
    return parse_wordnet(
        (unpack(cache, "wordnet-base") / "usr/share/wordnet/data.noun").read_text(encoding="latin1")
    )


def _gcide(cache: Path) -> list[Example]:
    return parse_gcide(_dictionary(cache, "gcide"))


def _bible(cache: Path) -> list[Example]:
    command = [str(unpack(cache, "bible-kjv") / "usr/bin/bible"), "-f", "gen1:1-rev22:21"]
    texts = unpack(cache, "bible-kjv-text") / "usr/lib"
    return parse_bible(_run(command, cwd=texts, env={**os.environ, "COLUMNS": "100000"}))


def _debian(cache: Path) -> list[Example]:
    return parse_packages(_run(["apt-cache", "dumpavail"]))


def _foldoc(cache: Path) -> list[Example]:
    return parse_foldoc(_dictionary(cache, "foldoc"))


def _fortune(cache: Path) -> list[Example]:
    folder = unpack(cache, "fortunes") / "usr/share/games/fortunes"
    return parse_fortunes({name: (folder / name).read_text("utf-8", "replace") for name in FORTUNES})


def _austen(cache: Path) -> list[Example]:
    data = _r_data(cache, "janeaustenr")
    return [example for name in NOVELS for example in parse_novel(name, read_lazy(data, name).values)]


def _trump(cache: Path) -> list[Example]:
    columns = read_lazy(_r_data(cache, "dslabs"), "trump_tweets").named()
    return parse_tweets({name: column.values for name, column in columns.items()})


def _dictionary(cache: Path, name: str) -> str:
    path = unpack(cache, f"dict-{name}") / f"usr/share/dictd/{name}.dict.dz"
    return gzip.decompress(path.read_bytes()).decode("utf-8", "replace")


def _r_data(cache: Path, name: str) -> Path:
    return unpack(cache, f"r-cran-{name}") / f"usr/lib/R/site-library/{name}/data/Rdata"


@dataclass(frozen=True)
class DebianTask:
    """How a task is made: its examples, its prompts, at most so many texts of a class, the pinned hash."""

    build: Callable[[Path], list[Example]]
    prompts: Mapping[str, str]
    per_class: int
    sha256: str | None


TASKS: dict[str, DebianTask] = {
    "wordnet": DebianTask(
        _wordnet,
        LEXICOGRAPHER_FILES,
        400,
        "08d9999c286d7f683b487a0f7f35cf666b50a2b952094a664f85abe4f6f14466",
    ),
    "gcide": DebianTask(
        _gcide,
        PARTS_OF_SPEECH,
        1500,
        "bdde71cf4e33bbc523719cceb8b7c87857081b56c103e323a2f3215d86dd0b17",
    ),
    "bible": DebianTask(
        _bible,
        {label: f"Bible verse from the {label}" for label in BOOKS},
        900,
        "008daa2cabc1fe9a312f784a2268ac54126fa61092adaa2161d798f1dabf8b76",
    ),
    "debian": DebianTask(
        _debian,
        {section: f"software for {name}" for section, name in SECTIONS.items()},
        350,
        None,  # the package lists of the machine, which every update changes
    ),
    "foldoc": DebianTask(
        _foldoc,
        {field: f"computing term: {name}" for field, name in FIELDS.items()},
        500,
        "9ecc0d79e967de1617216eae39c33cac6a3fefd3f2a7d0864268423bdf544ffa",
    ),
    "fortune": DebianTask(
        _fortune,
        FORTUNES,
        500,
        "5bce5ebe80e0cd0c730e8995e2a42b6b868197f964b34a508889b8d5d4f17e3b",
    ),
    "austen": DebianTask(
        _austen,
        {name: f"from the novel {title} by Jane Austen" for name, title in NOVELS.items()},
        920,
        "46e1b946a97f0aa16ff826a23104c2759f3da4b6af452e675640fbc3228e1fa0",
    ),
    "trump": DebianTask(
        _trump,
        {source: f"tweet of Donald Trump sent from {device}" for source, device in DEVICES.items()},
        2200,
        "2e23348023b7d9021851e42d14667812be5c5b0f520725a13e0b899e38658702",
    ),
}


def prepare(name: str, cache: Path, *, accept_changed: bool = False) -> TaskData:
    """A task built from the Debian archive, or read from the cache, its pinned sha256 checked either way.

    Args:
        name: the task.
        cache: the cache folder.
        accept_changed: take data of another sha256 than the pinned one, as another Debian release has it.

    Raises:
        ValueError: there is no such task.
        SourceError: the prepared data is not the pinned one.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    source = TASKS[name]
    cached = cache / "tasks" / f"debian-{name}.json"
    if cached.is_file():
        text = cached.read_text(encoding="utf-8")
        if accept_changed or source.sha256 in (None, _sha256(text)):
            return TaskData.from_json(text)
    task = split(name, source.build(cache), source.prompts, per_class=source.per_class)
    text = task.to_json()
    if not accept_changed and source.sha256 not in (None, _sha256(text)):
        raise SourceError(
            f"task {name}: the prepared data must have sha256 {source.sha256}, got {_sha256(text)}: "
            "the archive of this machine has other packages than Debian 12; prepare(…, accept_changed=True) "
            "takes them, for numbers comparable within this machine only"
        )
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(cached)
    return task


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
