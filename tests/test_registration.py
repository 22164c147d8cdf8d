"""Every op is registered alike: schema, fake, torch default, error on backward, test file and benchmark."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from dirmerge import backends, ops

ROOT = Path(__file__).parents[1]
NAMES = sorted(name for name in ops.__all__ if inspect.isfunction(getattr(ops, name)))


def matrices(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# Arguments of the registered op, keyword arguments, and the public function's result for them.
SAMPLES: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "delta": [
        ((matrices(5, 7), matrices(5, 7)), {}),
        ((matrices(7, 5).T.bfloat16(), matrices(5, 7).half()), {}),
        ((matrices(0, 3).double(), matrices(0, 3)), {}),
    ],
    "delta_add": [
        ((matrices(5, 7), [matrices(5, 7)], [0.5]), {}),
        (
            (matrices(7, 5).T.bfloat16(), [matrices(5, 7), matrices(7, 5).half().T], [0.5, -1.0]),
            {"out_dtype": torch.float64},
        ),
        ((None, [matrices(7, 5).T.bfloat16(), matrices(5, 7)], [0.5, 1.0]), {}),
        ((matrices(0, 3), [matrices(0, 3)], [1.0]), {}),
    ],
    "delta_elect_add": [
        ((matrices(5, 7), [matrices(5, 7)], None, [0.5]), {"scale": 1.0}),
        (
            (
                matrices(7, 5).T.bfloat16(),
                [matrices(5, 7), matrices(7, 5).half().T],
                torch.ones(2),
                [0.5, 1.0],
            ),
            {"scale": 0.5, "out_dtype": torch.float64},
        ),
        ((None, [matrices(5, 7).half(), matrices(5, 7)], torch.ones(2).double(), [0.5, 1.0]), {"scale": 2.0}),
    ],
    "delta_kth_magnitude": [
        ((matrices(5, 7) + 1, [matrices(5, 7)], 3), {}),
        ((matrices(7, 5).T.bfloat16(), [matrices(5, 7), matrices(7, 5).half().T], 35), {}),
        ((None, [matrices(5, 7).double()], 1), {}),
    ],
    "delta_sketch": [
        ((matrices(5, 7), [matrices(5, 7)]), {"width": 3, "seed": 2**40}),
        (
            (matrices(7, 5).T.bfloat16(), [matrices(5, 7)] * 2, matrices(2, 5, 3)),
            {"width": 3, "transposed": True},
        ),
        ((matrices(0, 3), []), {"width": 3}),
    ],
    "elect_merge": [
        ((matrices(3, 6, 6),), {}),
        ((matrices(3, 6, 6), torch.ones(3) / 2, [1.0, 2.0, 0.5]), {}),
        ((matrices(6, 6, 3).permute(2, 0, 1).double(),), {}),
    ],
    "etf_project": [((matrices(5, 7),), {}), ((matrices(2, 7, 5).mT.half(),), {})],
    "gram": [((matrices(5, 7),), {}), ((matrices(2, 7, 5).mT.half(),), {})],
    "kth_largest_magnitude": [((matrices(3, 6, 5), 4), {}), ((matrices(6, 3).T.double(), 1), {})],
    "lowrank_add": [
        ((matrices(5, 7), matrices(5, 2), matrices(7, 2)), {}),
        (
            (matrices(7, 5).T.bfloat16(), matrices(5, 2), matrices(7, 2)),
            {"scale": 0.5, "out_dtype": torch.float32},
        ),
        ((matrices(5, 7).half(), matrices(5, 0), matrices(7, 0)), {}),
    ],
    "polar_step": [
        ((matrices(5, 7) / 9, 1.5, -0.5, 0.0), {}),
        ((matrices(2, 5, 7).mT.bfloat16() / 9, 1.5, -0.5, 0.0), {}),
    ],
    "rotation_step": [
        ((torch.eye(5), matrices(5, 5)), {"rate": 0.1}),
        ((torch.eye(5).double().expand(2, 5, 5), matrices(2, 5, 5)), {"rate": 0.1, "steps": 2}),
    ],
}
CASES = [
    pytest.param(name, args, kwargs, id=f"{name}-{i}")
    for name, samples in SAMPLES.items()
    for i, (args, kwargs) in enumerate(samples)
]


def overload(name: str) -> torch._ops.OpOverload[..., Any]:
    found: torch._ops.OpOverload[..., Any] = getattr(torch.ops.dirmerge, name).default
    return found


def test_every_op_has_samples_here_a_test_file_and_a_benchmark() -> None:
    assert sorted(SAMPLES) == NAMES
    for name in NAMES:
        assert (ROOT / "dirmerge" / "ops" / f"{name}.py").is_file()
        assert (ROOT / "tests" / "ops" / f"test_{name}.py").is_file()
        assert (ROOT / "benchmarks" / f"bench_{name}.py").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_torch_takes_every_dtype_on_every_device(name: str) -> None:
    default = backends.implementations(name, "cpu")["torch"]
    assert default.devices is None
    assert default.dtypes is None


@pytest.mark.parametrize(("name", "args", "kwargs"), CASES)
def test_opcheck(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    results = torch.library.opcheck(overload(name), args, kwargs)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("name", "args", "kwargs"), CASES)
def test_outputs_share_no_memory_with_inputs_and_are_contiguous(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    result = overload(name)(*args, **kwargs)
    inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor) and a.numel()}
    for output in result if isinstance(result, tuple) else (result,):
        assert output.is_contiguous()
        assert output.untyped_storage().data_ptr() not in inputs


@pytest.mark.parametrize("name", NAMES)
def test_the_public_function_has_the_names_of_the_schema(name: str) -> None:
    schema = [argument.name for argument in overload(name)._schema.arguments]
    assert list(inspect.signature(getattr(ops, name)).parameters) == schema


@pytest.mark.parametrize("name", NAMES)
def test_backward_raises_instead_of_giving_wrong_gradients(name: str) -> None:
    args, kwargs = SAMPLES[name][0]
    result = getattr(ops, name)(args[0].clone().requires_grad_(), *args[1:], **kwargs)
    value = result[0] if isinstance(result, tuple) else result
    with pytest.raises(NotImplementedError, match=f"dirmerge.ops.{name} is not differentiable"):
        value.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_a_fake_refuses_what_the_public_function_refuses(name: str) -> None:
    args, kwargs = SAMPLES[name][0]
    wrong = (torch.zeros(2, 3, dtype=torch.int32, device="meta"), *args[1:])
    with pytest.raises(TypeError, match=r"must have dtype .* got int32"):
        getattr(ops, name)(*wrong, **kwargs)
    with pytest.raises(TypeError, match=r"must have dtype .* got int32"):
        overload(name)(*wrong, **kwargs)


def test_compiles_into_one_graph() -> None:
    def merge(x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        thresholds = ops.kth_largest_magnitude(x, 20)
        merged = ops.elect_merge(x, thresholds, [1.0, 2.0, 3.0])
        return ops.lowrank_add(base, ops.etf_project(merged), ops.delta(base, merged).value, scale=0.5)

    x = matrices(3, 12, 12)
    base = matrices(12, 12).bfloat16()
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, base), merge(x, base))
