"""Four more tasks from Debian packages, downloaded by apt-get and unpacked by dpkg-deb; nothing is installed.

| task | texts | package | licence |
|---|---|---|---|
| wordnet | gloss of a noun → its lexicographer file | wordnet-base | WordNet |
| gcide | definition → part of speech | dict-gcide | GPL-2+ |
| bible | verse of the King James Bible → group of books | bible-kjv, bible-kjv-text | GPL-2+ |
| debian | one-line description → archive section | the package lists of the machine | metadata |

The data follows the release of the machine's archive and is not pinned: compare within one machine.
"""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from dirmerge.demo.data import Example, TaskData, split

PACKAGES = ("wordnet-base", "dict-gcide", "bible-kjv", "bible-kjv-text")
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


def unpack(cache: Path) -> Path:
    """The folder with the unpacked packages, downloaded on first use.

    Raises:
        RuntimeError: apt-get or dpkg-deb failed.
    """
    folder = cache / "debian"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="debian-") as staging:
            _run(["apt-get", "download", *PACKAGES], cwd=Path(staging))
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
            source = fields.get("Source", fields["Package"]).split()[0]
            examples.append(Example(description, fields["Section"], source))
    return examples


def _wordnet(cache: Path) -> list[Example]:
    return parse_wordnet((unpack(cache) / "usr/share/wordnet/data.noun").read_text(encoding="latin1"))


def _gcide(cache: Path) -> list[Example]:
    content = gzip.decompress((unpack(cache) / "usr/share/dictd/gcide.dict.dz").read_bytes())
    return parse_gcide(content.decode("utf-8", "replace"))


def _bible(cache: Path) -> list[Example]:
    tree = unpack(cache)
    command = [str(tree / "usr/bin/bible"), "-f", "gen1:1-rev22:21"]
    return parse_bible(_run(command, cwd=tree / "usr/lib", env={**os.environ, "COLUMNS": "100000"}))


def _debian(cache: Path) -> list[Example]:
    return parse_packages(_run(["apt-cache", "dumpavail"]))


TASKS: dict[str, tuple[Callable[[Path], list[Example]], Mapping[str, str], int]] = {
    "wordnet": (_wordnet, LEXICOGRAPHER_FILES, 400),
    "gcide": (_gcide, PARTS_OF_SPEECH, 1500),
    "bible": (_bible, {label: f"Bible verse from the {label}" for label in BOOKS}, 900),
    "debian": (_debian, {section: f"software for {name}" for section, name in SECTIONS.items()}, 350),
}


def prepare(name: str, cache: Path) -> TaskData:
    """A task built from the Debian archive, or read from the cache."""
    cached = cache / "tasks" / f"debian-{name}.json"
    if cached.is_file():
        return TaskData.from_json(cached.read_text(encoding="utf-8"))
    build, prompts, per_class = TASKS[name]
    task = split(name, build(cache), prompts, per_class=per_class)
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(".partial")
    partial.write_text(task.to_json(), encoding="utf-8")
    partial.replace(cached)
    return task
