from __future__ import annotations

import itertools
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import torch
import yaml
from helpers import tiny_state, write_adapter_folder, write_model
from safetensors.torch import save_file
from typer.testing import CliRunner

from dirmerge.cli import app
from dirmerge.diagnostics import Inspection, charts, inspect, wording
from dirmerge.diagnostics.page import by_layer, to_html
from dirmerge.engine.result import compute_text

BASE = tiny_state()
HOSTILE = '</text><script>alert("1")</script>&amp;\x07'


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders base, a, b and adapters x, y; recipe.yml merges a and b, adapters.yml x and y."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "base", BASE)
    for seed, name in enumerate("ab", 1):
        write_model(folder / name, tiny_state(seed, base=BASE))
    for seed, name in enumerate("xy"):
        write_adapter_folder(folder / name, seed=seed)
    for file, names in (("recipe.yml", "ab"), ("adapters.yml", "xy")):
        plain = {
            "merge_method": "tsv_m",
            "base_model": str(folder / "base"),
            "models": [{"model": str(folder / name)} for name in names],
        }
        (folder / file).write_text(yaml.safe_dump(plain))
    return folder


@pytest.fixture(scope="module")
def found(models) -> Inspection:
    return inspect(models / "recipe.yml", class_means={"a": torch.eye(3)})


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class Page(HTMLParser):
    """Collects the texts, tags and attributes of a page as a browser's parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def renamed(found: Inspection, name: str) -> Inspection:
    """The same figures under a hostile name, wherever a name from outside comes in."""
    plain = found.to_dict()
    plain |= {"source": name, "base": name, "notes": [name], "scale": name, "options": {name: name}}
    plain["tasks"] = [f"{name}{i}" for i in range(len(plain["tasks"]))]
    plain["class_gaps"] = {name: 0.5}
    for i, parameter in enumerate(plain["parameters"]):
        parameter |= {"name": f"{name}.{i}.weight", "notes": [name]}
    return Inspection.from_dict(plain)


def test_the_page_is_well_formed_and_self_contained(found):
    text = to_html(found)
    root = ElementTree.fromstring(text[text.index("<html") :])
    assert {child.tag for child in root} == {"head", "body"}
    page = Page(text)
    assert "script" not in page.tags
    assert not {name for name, _ in page.attributes} & {
        "src",
        "href",
        "srcset",
        "xlink:href",
        "action",
        "data",
    }
    assert not re.search(r"https?:|url\(|@import|//", text)
    assert page.tags.count("svg") == 5
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_hostile_names_stay_text(found):
    text = to_html(renamed(found, HOSTILE))
    assert "<script" not in text
    assert "\x07" not in text
    page = Page(text)
    assert "script" not in page.tags
    assert any('</text><script>alert("1")</script>&amp;\ufffd' in part for part in page.texts)
    ElementTree.fromstring(text[text.index("<html") :])
    to_html(renamed(found, "\ud800 lone")).encode()


def test_the_page_shows_the_figures_it_was_given(found):
    page = Page(to_html(found))
    texts = "\n".join(page.texts)
    for parameter in found.parameters:
        assert parameter.name.removesuffix(".weight").removeprefix("layers.") in texts
        for name, task in zip("ab", parameter.tasks, strict=True):
            short = parameter.name.removesuffix(".weight").removeprefix("layers.")
            assert f"{short} · {name}: {100 * task.similarity_after:.0f}" in page.texts
            assert f"{short} · {name}: {100 * task.alignment:.0f}" in page.texts
    assert compute_text(found.compute) in texts
    overlap = 100 * found.summary.left.overlap[0][1]
    assert f"a · b: {overlap:.0f}" in page.texts
    assert wording.number(found.summary.interference) in page.texts
    assert wording.share(found.summary.opposed) in page.texts


def test_many_matrices_are_shown_by_layer_and_listed_in_full(found, monkeypatch):
    monkeypatch.setattr("dirmerge.diagnostics.page.ROWS_OF_MATRICES", 3)
    page = Page(to_html(found))
    layers = by_layer(found.parameters)
    assert [name for name, _ in layers] == ["layers.0", "layers.1", "layers.11"]
    assert [len(members) for _, members in layers] == [2, 2, 1]
    pair = [parameter.tasks[0].similarity_after for parameter in layers[0][1]]
    assert f"0 · a: {100 * sum(pair) / 2:.0f}" in page.texts
    assert all(
        parameter.name.removeprefix("layers.").removesuffix(".weight") in page.texts
        for parameter in found.parameters
    )


def test_short_names():
    assert wording.short_names(["/m/a", "/m/b"]) == ["a", "b"]
    assert wording.short_names(["/m/a/v1", "/m/b/v1"]) == ["a/v1", "b/v1"]
    assert wording.short_names(["same", "same"]) == ["same (1)", "same (2)"]
    assert wording.short_parameters(["m.0.q.weight", "m.1.q.weight"]) == ["0", "1"]
    assert wording.short_parameters(["m.0.q.weight", "m.0.q.bias"]) == ["weight", "bias"]
    assert wording.short_parameters(["one"]) == ["one"]


def luminance(fill: str) -> float:
    parts = [int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("ramp", [charts.BLUE, charts.BROWN])
def test_ramps_darken_evenly_and_text_on_them_can_be_read(ramp):
    fills = [charts.colour(i / 100, ramp) for i in range(101)]
    assert (fills[0], fills[-1]) == (ramp[0], ramp[-1])
    lights = [luminance(fill) for fill in fills]
    assert all(a > b for a, b in itertools.pairwise(lights))
    for fill, light in zip(fills, lights, strict=True):
        ink = luminance(charts.ink_on(fill))
        assert (max(ink, light) + 0.05) / (min(ink, light) + 0.05) >= 4.5  # WCAG AA
    assert charts.colour(-3, ramp) == ramp[0]
    assert charts.colour(7, ramp) == ramp[-1]


@pytest.mark.parametrize("recipe", ["recipe.yml", "adapters.yml"])
def test_inspect_prints_a_summary_and_writes_page_and_figures(models, tmp_path, recipe):
    page, figures = tmp_path / "report.html", tmp_path / "report.json"
    done = call("inspect", models / recipe, "--html", page, "--json", figures)
    assert done.exit_code == 0, done.stderr
    for text in ("tsv_m, 5 matrices", "Input spaces overlap", "DirSim", "λ = ", str(page), str(figures)):
        assert text in done.stdout
    written = Inspection.from_dict(json.loads(figures.read_text()))
    again = inspect(models / recipe)
    assert written.parameters == again.parameters
    assert page.read_text() == to_html(written)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_inspect_of_a_finished_merge(models, tmp_path):
    call("merge", models / "recipe.yml", "--out", tmp_path / "out")
    done = call("inspect", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "default of tsv_m for full fine-tunes" in done.stdout
    silent = call("inspect", tmp_path / "out", "--quiet", "--json", tmp_path / "figures.json")
    assert (silent.exit_code, silent.stdout, silent.stderr) == (0, "", "")
    assert json.loads((tmp_path / "figures.json").read_text())["finished"]


def test_inspect_refuses_before_it_works(models, tmp_path, monkeypatch):
    page = tmp_path / "report.html"
    page.write_text("mine")
    monkeypatch.setattr("dirmerge.diagnostics.inspect", lambda *_, **__: pytest.fail("must not begin"))
    for arguments, message in (
        (["--html", page], "exists; choose another file or pass --overwrite"),
        (["--json", tmp_path], "is a folder"),
        (["--json", tmp_path / "no" / "figures.json"], "its folder does not exist"),
        (["--html", tmp_path / "one", "--json", tmp_path / "one"], "both the page and the JSON"),
    ):
        done = call("inspect", models / "recipe.yml", *arguments)
        assert (done.exit_code, done.stdout) == (6, "")
        assert message in done.stderr
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = call("inspect", models / "recipe.yml", "--html", tmp_path / "new.html")
    assert done.exit_code == 1
    assert "pip install 'dirmerge[report]'" in done.stderr
    assert page.read_text() == "mine"


def test_overwrite_and_errors_have_their_exit_codes(models, tmp_path):
    page = tmp_path / "report.html"
    for mine in ("old", '{"dirmerge": "0.1.0"}'):
        page.write_text(mine)
        for option in ("--html", "--json"):
            refused = call("inspect", models / "recipe.yml", option, page, "--overwrite", "--quiet")
            assert (refused.exit_code, page.read_text()) == (6, mine)
            assert "was not written by `dirmerge inspect`" in refused.stderr
    page.unlink()
    figures = tmp_path / "figures.json"
    for _ in range(2):
        arguments = ("--html", page, "--json", figures, "--overwrite", "--quiet")
        assert call("inspect", models / "recipe.yml", *arguments).exit_code == 0
    assert call("inspect", models / "recipe.yml", "--html", page, "--overwrite", "--quiet").exit_code == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert call("inspect", tmp_path / "none.yml").exit_code == 3
    missing = call("inspect", models / "base")
    assert missing.exit_code == 4
    assert missing.stderr.startswith("dirmerge: ")
    save_file({"x": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    plain = yaml.safe_load((models / "recipe.yml").read_text())
    plain["models"][0]["model"] = str(tmp_path / "other.safetensors")
    (tmp_path / "bad.yml").write_text(yaml.safe_dump(plain))
    assert call("inspect", tmp_path / "bad.yml").exit_code == 5
