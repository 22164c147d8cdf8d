"""Where a merge runs: devices, threads and memory, and how the memory is shared."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch

from dirmerge.engine.compute import CPU, Budget, Compute
from dirmerge.engine.waiting import WaitingUpdates
from dirmerge.errors import RecipeError

MB = 1 << 20


def test_without_a_gpu_auto_is_the_cpu_and_says_why():
    found = Compute.resolve()
    assert found == Compute.resolve("auto")
    assert found.devices == (CPU,)
    assert "no GPU" in found.reason
    assert found.threads == torch.get_num_threads()
    assert Compute.resolve("cpu", 3, "2GB").to_dict() == {
        "devices": ["cpu"],
        "reason": "asked for",
        "threads": 3,
        "memory": 2 * 10**9,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cuda",), "sees no CUDA device"),
        (("tpu",), "must be auto, cpu, cuda"),
        (("cuda:x",), "must be auto, cpu, cuda"),
        (("cpu", 0), "threads must be at least 1"),
        (("cpu", None, 0), "memory must be at least 1"),
        (("cpu", None, "much"), "must be a size such as 5GB"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Compute.resolve(*arguments)


def test_gpus_are_chosen_by_number(shadow_gpu):
    with shadow_gpu(devices=3):
        assert [d.index for d in Compute.resolve().devices] == [0, 1, 2]
        assert [d.index for d in Compute.resolve("cuda").devices] == [0]
        assert [d.index for d in Compute.resolve("cuda:2,cuda:0").devices] == [2, 0]
        for wrong, message in (("cuda:3", "there are 3 GPUs"), ("cuda:1,cuda:1", "twice")):
            with pytest.raises(ValueError, match=message):
                Compute.resolve(wrong)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with contextlib.suppress(RuntimeError), Compute((CPU,), 1, None, "").scoped_threads():
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("memory", [300 * MB, 500 * MB, 1000 * MB, 64000 * MB])
@pytest.mark.parametrize("largest", [0, 100 * MB, 180 * MB])
def test_shares_fit_into_the_memory(memory, largest):
    used = 80 * MB
    budget = Budget.of(Compute((CPU,), 2, memory, ""), largest, 8 * MB, used, "recipe")
    assert budget.ahead >= 8 * MB
    assert budget.behind >= 8 * MB
    assert used + largest + budget.ahead + budget.behind + budget.waiting <= memory


def test_too_little_memory_is_refused_with_the_least_that_is_enough():
    def share(memory):
        return Budget.of(Compute((CPU,), 2, memory, ""), 100 * MB, 8 * MB, 80 * MB, "recipe.yml")

    with pytest.raises(RecipeError) as error:
        share(150 * MB)
    least = re.search(r"recipe\.yml: a memory of \d+ bytes is too small: .* at least (\d+)", str(error.value))
    assert least is not None
    share(int(least[1]))
    with pytest.raises(RecipeError):
        share(int(least[1]) - 1)


def test_updates_wait_in_memory_and_then_on_disk(tmp_path):
    values = {f"m{i}": torch.randn(8, 8) for i in range(4)}

    def is_equal(found, expected):
        return isinstance(found, torch.Tensor) and torch.equal(found, expected)

    with WaitingUpdates(tmp_path, {CPU: 2 * 256}) as waiting:
        for name, value in values.items():
            waiting.put(name, value)
        assert all(name in waiting for name in values)
        assert all(waiting.get(name) is values[name] for name in ("m0", "m1"))
        assert all(is_equal(waiting.get(name), values[name]) for name in ("m2", "m3"))
        with pytest.raises(KeyError):
            waiting.get("m0")
        waiting.put("again", values["m0"])  # the room is free again
        assert waiting.get("again") is values["m0"]
