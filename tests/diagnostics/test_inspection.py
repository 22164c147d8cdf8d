from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from helpers import tiny_state, write_adapter_folder, write_model

import dirmerge
from dirmerge.diagnostics import Inspection, inspect, measures, measuring
from dirmerge.engine.compute import Compute
from dirmerge.engine.result import Progress
from dirmerge.errors import CheckpointError, MismatchError, NonFiniteError, RecipeError

BASE = tiny_state()
NAME = "layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders base, full fine-tunes a b c and adapters x y z, with the float64 deltas of both kinds."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "base", BASE)
    states = {name: tiny_state(seed, base=BASE) for seed, name in enumerate("abc", 1)}
    for name, state in states.items():
        write_model(folder / name, state)
    deltas = {n: {k: v.double() - BASE[k].double() for k, v in state.items()} for n, state in states.items()}
    for seed, name in enumerate("xyz"):
        deltas[name] = write_adapter_folder(folder / name, rank=2 + seed, seed=seed)
    return folder, deltas


def recipe(folder, names, method="tsv_m", **keys):
    return {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in names],
    } | keys


def of(found: Inspection, name: str = NAME):
    return next(parameter for parameter in found.parameters if parameter.name == name)


@pytest.mark.parametrize(("names", "ranks"), [("abc", [5, 5, 5]), ("xyz", [2, 3, 4])])
def test_figures_of_one_matrix_are_those_of_its_dense_deltas(models, names, ranks):
    folder, all_deltas = models
    found = inspect(recipe(folder, names, "dc_merge", scale=1.5))
    parameter = of(found)
    deltas = [all_deltas[name][NAME] for name in names]
    merged = dirmerge.merge_deltas(deltas, "dc_merge", scale=1.5).dense()
    if names == "xyz":  # the options of adapters differ from those of dense deltas
        low = [dirmerge.LowRank(*_factors(d, r)) for d, r in zip(deltas, ranks, strict=True)]
        merged = dirmerge.merge_deltas(low, "dc_merge", scale=1.5).dense()
    svds = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    total = sum(deltas)
    assert (parameter.shape, parameter.scale) == ((24, 16), 1.5)
    for task, delta, (u, s, vh), r in zip(parameter.tasks, deltas, svds, ranks, strict=True):
        energy = s.square()
        spaces = u[:, :r], vh[:r].T
        before, after = (measures.response(x, *spaces) for x in (total, merged))
        expected = {
            "norm": float(delta.norm()),
            "directions": r,
            "core_energy": float(energy[:r].sum()),
            "kept_energy": float(energy[:r].sum() / energy.sum()),
            "directions_90": int((energy.cumsum(0) / energy.sum() < 0.9).sum()) + 1,
            "stable_rank": float(energy.sum() / energy[0]),
            "alignment": float((s[:r] * after.diagonal).sum() / energy[:r].sum()),
            "similarity_before": measures.directional_similarity(before, slice(None)),
            "similarity_after": measures.directional_similarity(after, slice(None)),
            "opposed": float(delta.abs()[delta * total < 0].sum() / delta.abs().sum()),
        }
        assert {key: getattr(task, key) for key in expected} == pytest.approx(expected, rel=2e-4)
    for side, k in (("left", 0), ("right", 2)):
        bases = [(svd[k] if k == 0 else svd[k].T)[:, :r] for svd, r in zip(svds, ranks, strict=True)]
        for i in range(3):
            row = [measures.subspace_overlap(bases[i], other) for other in bases]
            assert getattr(parameter, side).overlap[i] == pytest.approx(row, rel=1e-3, abs=1e-5)
    signs = measures.sign_conflicts([torch.stack(deltas)])
    assert parameter.sign_conflict == pytest.approx(signs.share, abs=1e-3)
    assert parameter.opposed == pytest.approx(signs.opposed, rel=1e-4)
    sums = measures.accumulation(torch.linalg.svdvals(total), [svd[1] for svd in svds])
    assert parameter.accumulation == pytest.approx(sums[: len(parameter.accumulation)], rel=1e-4)
    values = torch.linalg.svdvals(merged)
    assert parameter.merged_norm == pytest.approx(float(merged.norm()), rel=1e-4)
    assert parameter.merged_stable_rank == pytest.approx(float(merged.norm() / values[0]) ** 2, rel=1e-3)
    assert parameter.accumulation_merged[0] == pytest.approx(
        float(values[0]) / max(float(svd[1][0]) for svd in svds), rel=1e-4
    )


def _factors(delta, rank):
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank] * s[:rank], None, vh[:rank].T


@pytest.mark.parametrize("keys", [{}, {"alignment_per": "parameter"}])
@pytest.mark.parametrize("names", ["abc", "xyz"])
def test_scale_and_alignment_are_those_of_the_merge(models, tmp_path, names, keys):
    folder, _ = models
    plain = recipe(folder, names, "tsv_m", **keys)
    result = dirmerge.merge(plain, tmp_path / "out")
    records = {record.name: record for record in result.records}
    found = inspect(plain)
    for parameter in found.parameters:
        record = records[parameter.name]
        assert parameter.scale == pytest.approx(record.scale, rel=1e-6)
        assert parameter.alignment == pytest.approx(record.alignment * record.scale, rel=1e-5)
    if not keys:
        assert found.summary.alignment == pytest.approx(result.alignment, rel=1e-6)
    assert sum(found.left_out.values()) + len(found.parameters) == len(result.records)


@pytest.mark.parametrize(("names", "as_adapter"), [("abc", False), ("xyz", False), ("xyz", True)])
def test_a_finished_merge_measures_as_its_recipe(models, tmp_path, names, as_adapter):
    folder, _ = models
    plain = recipe(folder, names, "dc_merge")
    dirmerge.merge(plain, tmp_path / "out", as_adapter=as_adapter)
    finished, planned = inspect(tmp_path / "out"), inspect(plain)
    assert finished.finished
    assert not planned.finished
    assert "(default of dc_merge for" in finished.scale
    for one, other in zip(finished.parameters, planned.parameters, strict=True):
        assert one.name == other.name
        assert one.alignment == pytest.approx(other.alignment, rel=1e-3)
        assert one.merged_norm == pytest.approx(other.merged_norm, rel=1e-3)
        assert one.outside_etf == pytest.approx(other.outside_etf, abs=2e-3)
        for mine, theirs in zip(one.tasks, other.tasks, strict=True):
            assert mine.similarity_after == pytest.approx(theirs.similarity_after, abs=2e-3)
            assert mine.similarity_before == theirs.similarity_before


def test_what_was_written_is_what_is_measured(models, tmp_path):
    folder, _ = models
    dirmerge.merge(recipe(folder, "abc", "tsv_m"), tmp_path / "out")
    write_model(tmp_path / "fake", BASE)  # as if the merge had changed nothing
    shutil.copy(tmp_path / "fake" / "model.safetensors", tmp_path / "out" / "model.safetensors")
    assert all(parameter.merged_norm == 0 for parameter in inspect(tmp_path / "out").parameters)


def test_equal_and_absent_tasks(models):
    folder, _ = models
    plain = recipe(folder, "aab", "task_arithmetic", scale=1.0)
    plain["models"][2]["parameters"] = {"weight": [{"filter": "mlp", "value": 0.0}, {"value": 1.0}]}
    found = inspect(plain)
    parameter = of(found)
    assert parameter.tasks[2] is None
    assert parameter.left.overlap[0][:2] == pytest.approx([1, 1])
    assert parameter.left.overlap[2] == [None] * 3
    assert parameter.left.mean_angle[0][1] == pytest.approx(0, abs=0.05)
    assert (parameter.sign_conflict, parameter.opposed) == (0, 0)
    assert parameter.accumulation[0] == pytest.approx(2, rel=1e-5)
    assert parameter.tasks[0].alignment == pytest.approx(2, rel=1e-5)
    assert parameter.tasks[0].similarity_after == pytest.approx(1, rel=1e-4)
    assert of(found, "layers.0.attn.q_proj.weight").tasks[2] is not None
    assert found.summary.tasks[2].similarity_after is not None


@pytest.mark.parametrize("names", ["abc", "xyz"])
def test_weights_count_in_norms_signs_and_sums(models, names):
    folder, all_deltas = models
    weights = [2.0, 0.5, -1.0]
    plain = recipe(folder, names, "task_arithmetic", scale=1.0)
    for entry, weight in zip(plain["models"], weights, strict=True):
        entry["parameters"] = {"weight": weight}
    parameter = of(inspect(plain))
    deltas = [w * all_deltas[name][NAME] for name, w in zip(names, weights, strict=True)]
    norms = [float(delta.norm()) for delta in deltas]
    assert [task.norm for task in parameter.tasks] == pytest.approx(norms, rel=1e-4)
    signs = measures.sign_conflicts([torch.stack(deltas)])
    assert parameter.sign_conflict == pytest.approx(signs.share, abs=1e-3)
    assert [task.opposed for task in parameter.tasks] == pytest.approx(signs.opposed_by_task, rel=1e-3)
    total = torch.linalg.svdvals(sum(deltas))
    sums = measures.accumulation(total, [torch.linalg.svdvals(delta) for delta in deltas])
    assert parameter.accumulation == pytest.approx(sums[: len(parameter.accumulation)], rel=1e-4)
    assert parameter.accumulation_merged == pytest.approx(parameter.accumulation, rel=1e-5)
    for task in parameter.tasks:  # the merged update is the plain sum
        assert task.similarity_after == pytest.approx(task.similarity_before, abs=1e-6)


def test_a_task_that_changes_nothing_has_no_directions(models):
    folder, _ = models
    shutil.copytree(folder / "base", folder / "still", dirs_exist_ok=True)
    found = inspect(recipe(folder, ["a", "b", "still"], scale=1.0))
    task = of(found).tasks[2]
    assert (task.norm, task.directions, task.directions_90, task.alignment) == (0, 0, 0, None)
    assert of(found).left.overlap[2] == [None] * 3
    assert found.summary.tasks[2].stable_rank is None
    nothing = inspect(recipe(folder, ["still", "still"], scale=1.0))
    assert nothing.summary.sign_conflict is None
    assert of(nothing).alignment is None
    assert of(nothing).interference is None
    assert nothing.summary.alignment is None
    assert Inspection.from_dict(nothing.to_dict()) == nothing


def test_matrices_that_no_task_changes_do_not_count_in_means(models, tmp_path):
    folder, _ = models
    for name in "ab":
        state = tiny_state("ab".index(name) + 1, base=BASE)
        write_model(tmp_path / name, {k: BASE[k] if "mlp" in k else v for k, v in state.items()})
    found = inspect(recipe(folder, [str(tmp_path / name) for name in "ab"], scale=1.0))
    changed = [parameter for parameter in found.parameters if "mlp" not in parameter.name]
    assert [parameter.is_changed for parameter in found.parameters] == [
        p in changed for p in found.parameters
    ]
    expected = sum(parameter.sign_conflict for parameter in changed) / len(changed)
    assert found.summary.sign_conflict == pytest.approx(expected)
    expected = sum(parameter.tasks[0].stable_rank for parameter in changed) / len(changed)
    assert found.summary.tasks[0].stable_rank == pytest.approx(expected)


def test_signs_by_blocks_of_rows_and_spectra_of_large_matrices(models, monkeypatch):
    folder, _ = models
    whole = inspect(recipe(folder, "abc"))
    monkeypatch.setattr(measuring, "BLOCK_ENTRIES", 100)
    for one, other in zip(inspect(recipe(folder, "abc")).parameters, whole.parameters, strict=True):
        assert one.sign_conflict == other.sign_conflict
        assert one.opposed == pytest.approx(other.opposed, rel=1e-6)
    monkeypatch.setattr(measuring, "SPECTRUM_UP_TO", 0)
    for one, other in zip(inspect(recipe(folder, "abc")).parameters, whole.parameters, strict=True):
        assert one.accumulation == pytest.approx(other.accumulation[: len(one.accumulation)], rel=1e-4)
        for mine, theirs in zip(one.tasks, other.tasks, strict=True):
            assert mine.directions_90 is None  # noise: five directions of sixteen hold less
            assert theirs.directions_90 > 5
            assert (mine.norm, mine.stable_rank) == pytest.approx((theirs.norm, theirs.stable_rank), rel=1e-4)


def test_matrices_of_a_stack_stand_alone(tmp_path):
    def state(seed):
        generator = torch.Generator().manual_seed(seed)
        return {"layers.0.mlp.experts.up": torch.randn(3, 8, 6, generator=generator)}

    for seed, name in enumerate(["base", "a", "b"]):
        write_model(tmp_path / name, state(seed))
    found = inspect(recipe(tmp_path, "ab", "tsv_m", scale=1.0))
    assert [parameter.name for parameter in found.parameters] == [
        f"layers.0.mlp.experts.up[{i}]" for i in range(3)
    ]
    deltas = [
        (state(seed)["layers.0.mlp.experts.up"] - state(0)["layers.0.mlp.experts.up"]) for seed in (1, 2)
    ]
    for i, parameter in enumerate(found.parameters):
        expected = measures.sign_conflicts([torch.stack([delta[i] for delta in deltas])])
        assert parameter.sign_conflict == pytest.approx(expected.share)
        assert parameter.tasks[1].norm == pytest.approx(float(deltas[1][i].norm()), rel=1e-5)


def test_plain_data_comes_back_and_progress_is_told(models):
    folder, _ = models
    steps: list[Progress] = []
    means = torch.eye(4)[:, :3]
    found = inspect(recipe(folder, "xy"), class_means={"head": means}, progress=steps.append)
    assert found.class_gaps == {"head": pytest.approx(0, abs=1e-7)}
    assert Inspection.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found
    assert [step.name for step in steps] == [parameter.name for parameter in found.parameters]
    assert [step.done for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-1].work == 1
    with pytest.raises(ValueError, match="extra"):
        Inspection.from_dict(found.to_dict() | {"more": 1})


def test_adapters_need_no_base(models):
    folder, _ = models
    plain = recipe(folder, "xyz")
    with_base = inspect(plain)
    del plain["base_model"]
    without = inspect(plain)
    assert without.base is None
    assert without.parameters == with_base.parameters
    plain["models"][0]["model"] = str(folder / "a")
    with pytest.raises(RecipeError, match="base_model is missing"):
        inspect(plain)


def test_folders_that_cannot_be_inspected(models, tmp_path):
    folder, _ = models
    with pytest.raises(CheckpointError, match=r"has no dirmerge\.json; give a recipe"):
        inspect(folder / "base")
    sources = tmp_path / "sources"
    for name in ("base", "a", "b"):
        shutil.copytree(folder / name, sources / name)
    dirmerge.merge(recipe(sources, "ab"), tmp_path / "out")
    manifest = tmp_path / "out" / "dirmerge.json"
    text = manifest.read_text()

    write_model(sources / "b", tiny_state(9, base=BASE))
    with pytest.raises(MismatchError, match=r"b/model.safetensors: is not the file that was merged"):
        inspect(tmp_path / "out")
    shutil.rmtree(sources / "b")
    with pytest.raises(
        CheckpointError, match=r"inputs of this merge cannot be opened .*no such file or folder"
    ):
        inspect(tmp_path / "out")
    for broken in (
        {},
        {"recipe": [], "output": "model", "inputs": []},
        {"recipe": {}, "output": 3, "inputs": []},
    ):
        manifest.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match="is not the manifest of a merge"):
            inspect(tmp_path / "out")
    manifest.write_text(json.dumps(json.loads(text) | {"recipe": {"merge_method": "no_such"}}))
    with pytest.raises(RecipeError, match=r"dirmerge.json: its recipe is not valid"):
        inspect(tmp_path / "out")
    manifest.write_text(text.replace('"kind": "model"', '"kind": "state dict"'))
    with pytest.raises(CheckpointError, match="state dicts in memory"):
        inspect(tmp_path / "out")


def test_inputs_without_matrices_or_with_nan(models, tmp_path):
    folder, _ = models
    with pytest.raises(RecipeError, match="merges no matrix"):
        inspect(recipe(folder, "ab", tensors=[{"match": "*", "rule": "mean"}]))
    state = tiny_state(1, base=BASE)
    state[NAME][3, 5] = torch.nan
    write_model(tmp_path / "nan", state)
    plain = recipe(folder, "ab")
    plain["models"].append({"model": str(tmp_path / "nan")})
    with pytest.raises(NonFiniteError, match=NAME):
        inspect(plain)


def test_threads_and_memory_are_used_and_reported(models):
    folder, _ = models
    threads, usual = set(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = inspect(
            recipe(folder, "abc"),
            progress=lambda _: threads.add(torch.get_num_threads()),
            device="cpu",
            threads=1,
            memory="30GB",
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(usual)
    assert threads == {1}
    expected = {"devices": ["cpu"], "reason": "asked for", "threads": 1, "memory": 30_000_000_000}
    assert found.compute == found.to_dict()["compute"] == expected
    with pytest.raises(RecipeError, match="a memory of 1000000 bytes is too small"):
        inspect(recipe(folder, "abc"), memory="1MB")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(models):
    folder, _ = models
    with pytest.raises(ValueError, match="device 'cuda' was asked for, but torch sees no CUDA device"):
        inspect(recipe(folder, "abc"), device="cuda")


def test_of_several_gpus_the_first_is_used():
    gpus = (torch.device("cuda", 2), torch.device("cuda", 0))
    first = Compute(gpus, 3, 5, "asked for").on_first()
    assert first == Compute(gpus[:1], 3, 5, "the first of 2 GPUs; asked for")
    assert first.on_first() is first


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("names", ["abc", "xyz"])
def test_on_a_device(shadow_gpu, models, tmp_path, names, finished):
    folder, _ = models
    source: Any = recipe(folder, names, "dc_merge", scale=1.5)
    if finished:
        dirmerge.merge(source, tmp_path / "out", device="cpu")
        source = tmp_path / "out"
    expected = inspect(source, device="cpu")
    with shadow_gpu() as gpu:
        found = inspect(source, device="cuda")
    assert found.compute is not None
    assert found.compute["devices"] == ["cuda:0 (shadow)"]
    assert sum(launch.flops for launch in gpu.launches) > 0
    for mine, theirs in zip(found.parameters, expected.parameters, strict=True):
        assert mine.merged_norm == pytest.approx(theirs.merged_norm, rel=1e-5)
        assert mine.alignment == pytest.approx(theirs.alignment, rel=1e-4)
        assert mine.sign_conflict == theirs.sign_conflict
        assert mine.interference == pytest.approx(theirs.interference, rel=1e-4)
