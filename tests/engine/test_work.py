"""The merge of a batch of matrices with deferred decisions: one read, and a second run where one is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import MATRICES, tiny_state, write_adapter_folder, write_model
from safetensors.torch import load_file, save_file

from dirmerge import api
from dirmerge.engine.deltas import DeltaReader
from dirmerge.engine.work import matrices, merge_matrices
from dirmerge.errors import NonFiniteError

CPU = torch.device("cpu")
NAMES = [f"{name}.weight" for name in MATRICES]


def states():
    base = tiny_state()
    return base, [tiny_state(seed, base=base) for seed in (1, 2, 3)]


def batch(base, tuned, method="tsv_m", **keys):
    """The matrices of a plan, aligned, and the reader of their deltas."""
    models = [{"model": model} for model in tuned]
    plan = api.plan({"merge_method": method, "base_model": base, "models": models, **keys})
    work = [w for t in plan.tensors if t.rule == "merge" for w in matrices(plan, t, align=True)]
    return work, DeltaReader.of(plan)


def assert_same(found, expected):
    assert [x.work.name for x in found] == [x.work.name for x in expected]
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own.merged.dense(), other.merged.dense(), rtol=0, atol=1e-5)
        assert own.terms == pytest.approx(other.terms, rel=1e-4)
        assert own.merged.record.energy == pytest.approx(other.merged.record.energy, rel=1e-5)
        numbers = [*own.terms, *own.merged.record.energy]
        assert {type(number) for number in numbers} == {float}


@pytest.mark.parametrize("method", ["dc_merge", "tsv_m", "iso_c", "ties", "average", "wudi"])
def test_deferred_decisions_change_nothing(method):
    base, tuned = states()
    work, reader = batch(base, tuned, method)
    assert set(NAMES) <= {item.name for item in work}
    found = merge_matrices(work, reader, CPU, on_cpu=True)
    assert not any(matrix.is_repeated for matrix in found)
    assert_same(found, merge_matrices(work, reader, CPU))


def test_adapters(tmp_path):
    base, _ = states()
    write_model(tmp_path / "base", base)
    for t in range(3):
        write_adapter_folder(tmp_path / f"a{t}", seed=t)
    work, reader = batch(str(tmp_path / "base"), [str(tmp_path / f"a{t}") for t in range(3)], "dc_merge")
    found = merge_matrices(work, reader, CPU, on_cpu=True)
    assert not any(matrix.is_repeated for matrix in found)
    assert_same(found, merge_matrices(work, reader, CPU))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_is_named(tmp_path, value):
    write_model(tmp_path / "base", tiny_state())
    write_adapter_folder(tmp_path / "a", rank=2)
    file = tmp_path / "a" / "adapter_model.safetensors"
    factors = load_file(file)
    (name,) = [name for name in factors if "layers.1.mlp.up_proj.lora_B" in name]
    factors[name][0, 1] = value
    save_file(factors, file)
    work, reader = batch(str(tmp_path / "base"), [str(tmp_path / "a")], "average")
    with pytest.raises(NonFiniteError, match=r"adapter_model.safetensors.*layers\.1\.mlp\.up_proj"):
        merge_matrices(work, reader, CPU, on_cpu=True)


def test_only_the_matrix_whose_conditions_fail_is_merged_again():
    base, tuned = states()
    tuned[1][NAMES[2]] = base[NAMES[2]].clone()  # a task that does not change this one
    work, reader = batch(base, tuned)
    found = merge_matrices(work, reader, CPU, on_cpu=True)
    assert [matrix.work.name for matrix in found if matrix.is_repeated] == [NAMES[2]]
    expected = merge_matrices(work, reader, CPU)
    assert_same(found, expected)
    assert found[2].merged.record == expected[2].merged.record
    assert any("only 0 of" in note for note in found[2].merged.record.notes)


@pytest.mark.parametrize("method", ["dc_merge", "ties", "average", "iso_c"])
@pytest.mark.parametrize("where", ["base", "m1"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 3e38])
def test_values_that_are_not_finite_are_named(method, where, value):
    base, tuned = states()
    name = NAMES[1]
    (base if where == "base" else tuned[1])[name][3, 4] = value
    (tuned[1] if where == "base" else base)[name][
        3, 4
    ] = -3e38  # so that 3e38 leaves float32 in the difference
    work, reader = batch(base, tuned, method)
    with pytest.raises(NonFiniteError, match=name.replace(".", r"\.")):
        merge_matrices(work, reader, CPU, on_cpu=True)
