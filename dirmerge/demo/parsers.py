"""Parsers of the archives' files: examples with class and group."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping

from dirmerge.demo.examples import Example

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


def parse_vader(text: str, *, grouped: bool = False) -> list[Example]:
    """Reads VADER's ground truth, lines `id TAB mean rating TAB text`; keeps those with |rating| ≥ 0.5.

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
    """Reads the ICD-10-CM tabular list: every diagnosis, its chapter, its three-character category."""
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
    """Reads the Harmonized System: six-digit goods without their leading words, section, heading."""
    examples = []
    for row in json.loads(text)["hscodes"]:
        if row["level"] == "6" and row["section"] in HS_SECTIONS:
            # "Horses; live, pure-bred" → "live, pure-bred": the heading word would give the section away.
            goods = row["description"].split(";", 1)[-1].split(":", 1)[-1]
            examples.append(Example(goods, row["section"], row["parent"]))
    return examples


def parse_cities(cities: str, countries: str, count: int = 16) -> tuple[list[Example], dict[str, str]]:
    """Reads GeoNames' cities above 15000 people, of the `count` countries with most of them; adds prompts."""
    rows = list(json.loads(cities).values())
    frequency = Counter(row["countrycode"] for row in rows)
    top = sorted(frequency, key=lambda code: (-frequency[code], code))[:count]
    names = {row["iso"]: row["name"] for row in json.loads(countries).values()}
    examples = [
        Example(row["name"], row["countrycode"], row["name"]) for row in rows if row["countrycode"] in top
    ]
    return examples, {code: f"a city in {names[code]}" for code in top}


def parse_names(text: str) -> list[Example]:
    """Reads nam_dict.txt: first names that are only male (M) or only female (F)."""
    examples = []
    for line in text.splitlines():
        label, name = line[:2].strip(), line[3:29].strip()
        if label in ("M", "F") and name and "+" not in name:
            examples.append(Example(name, label, name))
    return examples


def parse_code(files: Mapping[str, str]) -> list[Example]:
    """Reads source files, by path `…/language/file`: three lines of more than eight characters, joined.

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
