"""The real-task benchmark: its results files, its estimates and rules, and the merges of its studies."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.tasks import __main__ as command_line
from benchmarks.tasks import alignment, experiments, report, sweep, updates
from benchmarks.tasks import setting as setting_module
from benchmarks.tasks.experiments import Post, Variant
from benchmarks.tasks.groups import Group
from benchmarks.tasks.setting import Setting
from benchmarks.tasks.store import Results, ResultsError, pack, read, unpack
from benchmarks.tasks.train import RECIPES, Recipe
from benchmarks.tasks.updates import FineTunes, merge
from dirmerge import merge_deltas
from dirmerge.alignment import LearnOptions
from dirmerge.deltas.lowrank import LowRank
from dirmerge.demo.data import TASKS
from dirmerge.demo.examples import TaskData
from dirmerge.demo.model import load_encoder
from dirmerge.methods import get_method


class TestStore:
    @given(st.text("01", min_size=1, max_size=700))
    def test_hits_survive(self, bits: str) -> None:
        assert unpack(pack(bits)) == bits

    def test_a_row_is_computed_once(self, tmp_path) -> None:
        path = tmp_path / "new" / "a.json"
        results = Results(path, {"seed": 1})
        assert results.get("x") is None
        assert results.once("x", lambda: {"v": 1}) == {"v": 1}
        assert Results(path, {"seed": 1}).once("x", lambda: pytest.fail("computed again")) == {"v": 1}
        assert [line[:5] for line in path.read_text().splitlines()[2:-1]] == ['"x": ']
        assert [p.name for p in path.parent.iterdir()] == ["a.json"]

    def test_another_run_s_file_is_refused(self, tmp_path) -> None:
        Results(tmp_path / "a.json", {"seed": 1, "texts": 5}).once("x", dict)
        with pytest.raises(ResultsError, match="made with other texts"):
            Results(tmp_path / "a.json", {"seed": 1, "texts": 6})

    def test_writers_do_not_lose_each_other_s_rows(self, tmp_path) -> None:
        path = tmp_path / "a.json"

        def add(i: int) -> None:
            Results(path, {}).once(f"row {i:02}", lambda: {"i": i})

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(add, range(40)))
        assert [row["i"] for row in read(path)["rows"].values()] == list(range(40))

    def test_a_failed_row_leaves_nothing(self, tmp_path) -> None:
        results = Results(tmp_path / "a.json", {})
        results.once("x", dict)
        with pytest.raises(ZeroDivisionError):
            results.once("y", lambda: {"v": 1 / 0})
        assert list(json.loads((tmp_path / "a.json").read_text())["rows"]) == ["x"]


@pytest.mark.parametrize("kind", experiments.KINDS)
def test_every_row_of_every_study_has_valid_options(kind) -> None:
    for study in (None, *experiments.STUDIES):
        rows = experiments.rows_of(study, kind)
        assert rows
        for variant in rows.values():
            adapters = experiments.family(kind) == "lora" or variant.truncated
            get_method(variant.method).validate(variant.options, adapters=adapters)


def test_sets_name_tasks_that_exist_once() -> None:
    known = {*TASKS, *experiments.DEBIAN}
    for found in experiments.SETS.values():
        assert len(set(found.tasks)) == len(found.tasks)
        assert set(found.tasks) <= known
    assert [len(experiments.SETS[n].tasks) for n in ("pypi", "twelve", "sixteen")] == [8, 12, 16]


def test_everything_is_a_list_of_commands_that_parse(monkeypatch, tmp_path) -> None:
    chosen = []

    def settings(arguments):
        chosen.append((arguments.sets, arguments.kinds, arguments.seeds, arguments.out, arguments.threads))
        return []

    for module in (command_line, alignment):
        monkeypatch.setattr(module, "settings", settings)
        monkeypatch.setattr(module.report, "write", lambda out: None)
    command_line.main(["--all", "--out", str(tmp_path), "--threads", "1"])
    assert len(chosen) == len(experiments.PLAN)
    assert {row[3:] for row in chosen} == {(tmp_path, 1)}
    assert {name for row in chosen for name in row[0]} == {*experiments.SETS}
    assert {kind for row in chosen for kind in row[1]} == {*experiments.KINDS}


def finetunes(generator, *, low_rank: bool = False) -> FineTunes:
    shape, tasks = (12, 8), 3
    deltas: list[torch.Tensor | LowRank] = [torch.randn(shape, generator=generator) for _ in range(tasks)]
    if low_rank:
        deltas = [
            LowRank(torch.randn(12, 2, generator=generator), None, torch.randn(8, 2, generator=generator))
            for _ in range(tasks)
        ]
    vectors: list[torch.Tensor | LowRank] = [torch.randn(5, generator=generator) for _ in range(tasks)]
    return FineTunes("lora" if low_rank else "full", ("a", "b", "c"), {"w": deltas, "v": vectors})


class TestMerge:
    def test_truncated_deltas_give_a_spectral_method_s_own_result(self, generator) -> None:
        found = finetunes(generator)
        whole = merge(found, Variant("tsv_m"))
        cut = merge(found, Variant("tsv_m", truncated=True))
        assert torch.allclose(whole.scaled["w"], cut.scaled["w"], atol=1e-5)
        assert whole.alignment == pytest.approx(cut.alignment, rel=1e-4)
        assert whole.similarity == pytest.approx(cut.similarity, rel=1e-4)
        assert whole.norm == pytest.approx(float(torch.linalg.matrix_norm(whole.scaled["w"])), rel=1e-5)
        assert torch.allclose(
            whole.fixed["v"],
            torch.stack([v for v in found.deltas["v"] if isinstance(v, torch.Tensor)]).mean(0),
        )

    def test_a_task_s_own_update_has_alignment_and_similarity_one(self, generator) -> None:
        found = finetunes(generator, low_rank=True)
        alone = FineTunes("lora", ("a",), {"w": found.deltas["w"][:1]})
        update = merge(alone, Variant("task_arithmetic"))
        assert update.alignment == pytest.approx(1, rel=1e-5)
        assert update.similarity == pytest.approx(1, rel=1e-5)

    def test_more_whitening_after_the_polar_frames_is_the_whitened_rule(self, generator) -> None:
        found = finetunes(generator)
        post = Post(left=1.0, right=0.5)
        options: dict[str, object] = {"left_exponent": 2.0, "right_exponent": 1.5, "ridge": 0.0}
        got = merge(found, Variant("tsv_m", post=post)).scaled["w"]
        assert torch.allclose(got, merge(found, Variant("whitened", options)).scaled["w"], atol=1e-3)

    def test_centring_is_mda_on_the_shared_frame(self, generator) -> None:
        found = finetunes(generator)
        got = merge(found, Variant("tsv_m", post=Post(centre=True))).scaled["w"]
        wanted = merge_deltas(found.deltas["w"], "mda", rank=2).dense()
        assert torch.allclose(got, wanted, atol=1e-4)


def test_the_scan_goes_on_while_it_gains_and_stops_after_two_losses(monkeypatch) -> None:
    scale = {"now": 0.0}
    monkeypatch.setattr(sweep, "set_weights", lambda model, base, update, value: scale.update(now=value))
    # Validation accuracy falls with the distance from an alignment of 1.15, a multiple of λ here.
    best = 1.15

    def evaluate(model, probes, *, bf16):
        hits = 1000 - int(1000 * abs(scale["now"] * 0.5 - best))
        return {"a": "1" * hits + "0" * (1000 - hits)}

    monkeypatch.setattr(sweep, "evaluate", evaluate)
    setting: Any = SimpleNamespace(
        kind="full", model=None, base=None, validation=[], bf16=False, own_accuracy=lambda split: {"a": 1.0}
    )
    curve = sweep.scan(setting, updates.Merge({}, alignment=0.5))
    assert [point["alignment"] for point in curve] == [0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5]
    assert max(curve, key=lambda point: point["normalised"])["scale"] == pytest.approx(2.3)


def group(rows: dict[int, dict[str, str]], own: str) -> Group:
    about = {
        "set": "s",
        "kind": "full",
        "merged": ["t"],
        "unseen": [],
        "validation_texts": 1,
        "test_texts": 1,
    }
    return Group(
        {
            seed: {
                "about": about,
                "rows": {
                    "own": {"own_test": {"t": pack(own)}, "base_test": {"t": pack(own)}},
                    **{name: {"test": {"t": pack(bits)}} for name, bits in named.items()},
                },
            }
            for seed, named in rows.items()
        }
    )


class TestEstimates:
    def test_by_hand(self) -> None:
        found = group({0: {"a": "1100", "b": "1110"}, 1: {"a": "1110", "b": "1111"}}, "1111")
        estimate = found.estimate("b", "a")
        assert estimate.value == pytest.approx(0.25)
        assert estimate.seeds == {0: 0.25, 1: 0.25}
        assert found.estimate("a", normalised=False).value == pytest.approx(0.625)
        longer = group({0: {"a": "1100" * 10}}, "1110" * 10)
        assert longer.estimate("a").value == pytest.approx(2 / 3)

    def test_the_interval_is_the_binomial_one(self) -> None:
        rng = np.random.default_rng(0)
        bits = "".join(map(str, rng.integers(0, 2, 600)))
        found = group({0: {"a": bits}}, "1" * 600).estimate("a")
        half = 1.96 * np.sqrt(found.value * (1 - found.value) / 600)
        assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
        assert found.low < found.value < found.high

    def test_differences_are_paired(self) -> None:
        rng = np.random.default_rng(1)
        bits = "".join(map(str, rng.integers(0, 2, 600)))
        better = "1" * 12 + bits[12:]
        found = group({0: {"a": bits, "same": bits, "better": better}}, "1" * 600)
        same = found.estimate("same", "a")
        assert (same.low, same.value, same.high) == (0, 0, 0)
        paired = found.estimate("better", "a")
        assert paired.high - paired.low < 0.5 * (found.estimate("a").high - found.estimate("a").low)

    def test_only_seeds_with_both_rows_count(self) -> None:
        found = group({0: {"a": "10", "b": "11"}, 1: {"a": "00"}}, "11")
        assert found.estimate("b", "a").seeds == {0: 0.5}
        assert found.seeds("a") == [0, 1]


def test_a_rule_loses_nothing_at_its_best_and_the_constant_is_found() -> None:
    curves: list[tuple[Any, Any]] = []
    for unit in (0.5, 2.0):  # the quantity at λ = 1; accuracy peaks where λ · unit = 0.9
        targets = np.exp(np.linspace(np.log(0.3), np.log(2.0), 25))
        curve = [{"scale": t / unit, "alignment": t, "normalised": 1 - abs(np.log(t / 0.9))} for t in targets]
        curves.append(({}, {"curve": curve, "unit": unit}))
    rule = report.Rule("q", lambda run, row: row["unit"])
    raw = report.Rule("λ", lambda run, row: 1.0)
    assert report.best_constant(rule, curves) == pytest.approx(0.9, rel=0.03)
    losses = [
        sum(r.regret(row, r.of(run, row), report.best_constant(r, curves)) for run, row in curves)
        for r in (rule, raw)
    ]
    assert losses[0] < 0.1
    assert losses[1] == pytest.approx(np.log(4), rel=0.1)


@pytest.fixture
def tiny(tiny_encoder, tmp_path, monkeypatch):
    """A function that makes a setting of two tasks, adapters of a tiny encoder trained for some steps."""
    pytest.importorskip("peft")
    words = ["good", "bad", "news", "text"]
    # The class follows the number, not the word that the prompts have: the base model knows next to nothing.
    pairs = [(f"{word} {i}", (i + k) % 4) for i in range(20) for k, word in enumerate(words)]
    tasks = {
        "movie": TaskData("movie", words, words, pairs, pairs, pairs),
        "city": TaskData("city", words[:3], words[:3], *[[(t, c) for t, c in pairs if c < 3]] * 3),
    }
    monkeypatch.setitem(experiments.SETS, "tiny", experiments.TaskSet(("movie", "city"), (), 30, 50))
    monkeypatch.setattr(setting_module, "prepare", lambda name, _: tasks[name])
    monkeypatch.setitem(RECIPES, "lora", Recipe("lora", 1e-2, 0.0, steps=12, batch=16, rank=2))
    archives: Any = SimpleNamespace(folder=tmp_path / "cache", base_model=lambda: tiny_encoder)
    return lambda: Setting("tiny", "lora", 0, archives, tmp_path / "results")


def test_a_row_is_of_the_merged_model_whenever_the_texts_are_read(tiny) -> None:
    measured = tiny()
    own = measured.own
    assert set(own["own_test"]) == {"movie", "city"}
    # A run that goes on from the stored row `own` reads the test texts after it has set the weights.
    row = command_line.measure(tiny(), "average", Variant("average"))
    encoder = load_encoder(measured.folder)
    update = merge(measured.finetunes, Variant("average"))
    updates.set_weights(encoder, measured.base, update, row["scale"])
    expected = updates.evaluate(encoder, measured.test, bf16=False)
    assert {task: unpack(hits) for task, hits in row["test"].items()} == expected
    assert row["test"] != own["base_test"]
    assert measured.normalised(row["test"]) == pytest.approx(
        sum(updates.mean(expected[t]) / updates.mean(unpack(own["own_test"][t])) for t in expected) / 2
    )


def test_results_are_of_one_data(tiny, monkeypatch) -> None:
    first = tiny()
    first.results.once("x", dict)
    changed = {task.name: replace(task, test=task.test[1:]) for task in first.data}
    monkeypatch.setattr(setting_module, "prepare", lambda name, _: changed[name])
    with pytest.raises(ResultsError, match="made with other data"):
        _ = tiny().results


def test_maps_and_learned_forms_become_rows_and_a_page(tiny, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    setting = tiny()
    for name in ("average", "tsv_m", "dc_merge"):
        command_line.measure(setting, name, Variant(name))
    command_line.measure(setting, "whitened 2 2 0", Variant("whitened"), test=False)
    bench = alignment.Bench(tiny())
    for method in ("tsv_m", None):
        alignment.closed_form_rows(bench, method)
    options = LearnOptions(steps=2, check_every=1, watch=1, min_agreement=1.0, lr_scale=0.9)
    for start in ("identity", "ridge"):
        alignment.learned_rows(bench, "tsv_m", start, options, "")
    alignment.adamerging_row(bench, options)
    rows = read(setting.results.path)["rows"]
    assert set(rows) == {
        "own",
        "average",
        "tsv_m",
        "dc_merge",
        "whitened 2 2 0",
        *(f"{m} + {kind}" for m in ("tsv_m", "base") for kind in ("rotation", "ridge")),
        *(f"tsv_m{start} + learned{kept}" for start in ("", " + ridge") for kept in ("", ", guarded")),
        "adamerging (layer-wise)",
    }
    # A run that its guard stops is run again without it, from the same start.
    guarded, plain = rows["tsv_m + learned, guarded"], rows["tsv_m + learned"]
    assert guarded["stopped"] is not None
    assert (guarded["best_step"], plain["best_step"], plain["steps"]) == (0, 2, 2)
    assert plain["history"][0]["loss"] == guarded["history"][0]["loss"]
    assert guarded["test"] == rows["tsv_m"]["test"] != plain["test"]
    # The ridge map imitates the fine-tune on the texts it was fitted on, which are the test texts here.
    own = rows["own"]["own_test"]
    agree = [
        np.mean(
            [a == b for a, b in zip(unpack(rows["base + ridge"]["test"][t]), unpack(own[t]), strict=True)]
        )
        for t in own
    ]
    plain = [
        np.mean([a == b for a, b in zip(unpack(rows["own"]["base_test"][t]), unpack(own[t]), strict=True)])
        for t in own
    ]
    assert sum(agree) >= sum(plain)
    report.write(tmp_path / "results")
    page = (tmp_path / "results.md").read_text()
    assert "whitened 2 2 0" in page
    with pytest.raises(SystemExit, match="no row iso_c: run"):
        bench.scale("iso_c")
    assert "tsv_m + rotation" in capsys.readouterr().out
