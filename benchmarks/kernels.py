"""Compiles every Triton kernel ahead of time and reads what the compiler says of it; needs no GPU.

    python -m benchmarks.kernels              prints the table and writes benchmarks/results/kernels.md

Each form is compiled as its launcher would launch it, for NVIDIA's sm_80 (A100), sm_90 (H100, H200) and
sm_100 (B200) and AMD's gfx942 (MI300). The run fails where a kernel uses the stack, as one that spills
registers does, or lacks the matrix instruction it is built on.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from dirmerge.triton_kernels import (
    delta_sketch,
    elect_merge,
    etf_project,
    etf_project_add,
    gram,
    kth_largest_magnitude,
    lowrank_add,
    polar_step,
    rotation_step,
)
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

RESULTS = Path(__file__).parent / "results" / "kernels.md"
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The instruction that a kernel built on matrix products must contain, for 16-bit and for float32 operands.
MATRIX_INSTRUCTIONS = {
    "sm_80": (r"mma\.sync\S*\.bf16\.bf16", r"mma\.sync\S*\.tf32\.tf32"),
    "sm_90": (r"wgmma\.mma_async\S*\.bf16\.bf16", r"wgmma\.mma_async\S*\.tf32\.tf32"),
    "sm_100": (r"tcgen05\.mma\S*kind::f16", r"tcgen05\.mma\S*kind::tf32"),
    "gfx942": (r"v_mfma_f32_\w+_bf16", r"v_mfma_f32_\w+_f32"),
}
ANY_MATRIX_INSTRUCTION = r"(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma)[\w.:]*"

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def zeros(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """A launcher looks at shapes, strides and alignment only; aligned where the sizes are multiples of 16."""
    return torch.zeros(shape, dtype=dtype)


@dataclass(frozen=True)
class Form:
    """One way to launch an op, and per kernel with matrix products whether its operands have 16 bits."""

    op: str
    name: str
    launch: Callable[[], Any]
    matrix: dict[str, bool]
    ieee: bool = False


def _sketch(name: str, dtype: torch.dtype, *, size: int = 512, narrow: bool, **options: Any) -> Form:
    def launch() -> None:
        base = zeros(size, size, dtype=dtype)
        test = zeros(2, size, 144) if options.get("test") else None
        rest = {key: value for key, value in options.items() if key != "test"}
        delta_sketch.delta_sketch(base, [base, base], test, width=144, **rest)

    ieee = options.get("precision") == "ieee"
    return Form("delta_sketch", name, launch, {} if ieee else {"delta_sketch_kernel": narrow}, ieee)


def _lowrank(name: str, base: torch.dtype, factor: torch.dtype, *, size: int = 512) -> Form:
    return Form(
        "lowrank_add",
        name,
        lambda: lowrank_add.lowrank_add(
            zeros(size, size, dtype=base), zeros(size, 96, dtype=factor), zeros(size, 96, dtype=factor)
        ),
        {"lowrank_add_kernel": factor == BF16},
    )


def _polar(name: str, dtype: torch.dtype, *, size: int = 512) -> Form:
    return Form(
        "polar_step",
        name,
        lambda: polar_step.polar_step(zeros(2, size, size, dtype=dtype), 1.0, 1.0, 1.0),
        {"gram_kernel": dtype == BF16, "polynomial_kernel": False, "apply_kernel": dtype == BF16},
    )


def _gram(name: str, dtype: torch.dtype, *, size: int = 512) -> Form:
    return Form(
        "gram", name, lambda: gram.gram(zeros(2, size, size, dtype=dtype)), {"gram_kernel": dtype == BF16}
    )


def _etf_add(name: str, base: torch.dtype, update: torch.dtype, *, size: int = 512) -> Form:
    return Form(
        "etf_project_add",
        name,
        lambda: etf_project_add.etf_project_add(
            zeros(size, size, dtype=base), zeros(size, size, dtype=update), zeros(size), 9
        ),
        {},
    )


def _elect(name: str, dtype: torch.dtype, blocks: list[int] | None) -> Form:
    return Form(
        "elect_merge",
        name,
        lambda: elect_merge.elect_merge(
            zeros(4, 512, 512, dtype=dtype), zeros(4, dtype=dtype), [1.0, 2.0, 3.0, 4.0], blocks
        ),
        {},
    )


FORMS = (
    *(
        Form("etf_project", name, lambda d=dtype, k=K: etf_project.etf_project(zeros(4, k, 512, dtype=d)), {})
        for name, dtype, K in (
            ("bfloat16, K = 128", BF16, 128),
            ("float32, K = 128", FP32, 128),
            ("float64, K = 128", FP64, 128),
            ("float32, K = 512", FP32, 512),
        )
    ),
    _etf_add("bfloat16", BF16, BF16),
    _etf_add("bfloat16, float32 update", BF16, FP32),
    _etf_add("float32", FP32, FP32),
    _etf_add("bfloat16, float32 update, odd rows", BF16, FP32, size=511),
    *(
        Form(
            "kth_largest_magnitude",
            str(dtype).removeprefix("torch."),
            lambda d=dtype: kth_largest_magnitude.kth_largest_magnitude(zeros(4, 512, 512, dtype=d), 99),
            {},
        )
        for dtype in (BF16, FP32, FP64)
    ),
    _elect("bfloat16", BF16, None),
    _elect("float32", FP32, None),
    _elect("float32, blocks", FP32, [128] * 4),
    _elect("float64, blocks", FP64, [128] * 4),
    _gram("bfloat16", BF16),
    _gram("float32", FP32),
    _gram("bfloat16, odd rows", BF16, size=511),
    _gram("float32, odd rows", FP32, size=511),
    _lowrank("bfloat16", BF16, BF16),
    _lowrank("bfloat16, float32 factors", BF16, FP32),
    _lowrank("float32", FP32, FP32),
    _lowrank("bfloat16, odd rows", BF16, BF16, size=511),
    _lowrank("bfloat16, float32 factors, odd rows", BF16, FP32, size=511),
    _sketch("bfloat16, random", BF16, narrow=True),
    _sketch("float32, random", FP32, narrow=True),
    _sketch("float32, random, odd rows", FP32, narrow=True, size=511),
    _sketch("bfloat16, given", BF16, narrow=False, test=True),
    _sketch("float32, given", FP32, narrow=False, test=True),
    _sketch("float32, given, odd rows", FP32, narrow=False, test=True, size=511),
    _sketch("float32, given, transposed", FP32, narrow=False, test=True, transposed=True),
    _sketch("bfloat16, random, bfloat16 products", BF16, narrow=True, precision="bfloat16"),
    _sketch("bfloat16, given, bfloat16 products", BF16, narrow=True, test=True, precision="bfloat16"),
    _sketch("bfloat16, random, IEEE", BF16, narrow=False, precision="ieee"),
    _sketch("bfloat16, given, IEEE", BF16, narrow=False, test=True, precision="ieee"),
    _sketch("float32, given, IEEE", FP32, narrow=False, test=True, precision="ieee"),
    _sketch("float32, given, IEEE, odd rows", FP32, narrow=False, test=True, precision="ieee", size=511),
    _polar("bfloat16", BF16),
    _polar("float32", FP32),
    _polar("bfloat16, odd rows", BF16, size=511),
    _polar("float32, odd rows", FP32, size=511),
    Form(
        "rotation_step",
        "float32",
        lambda: rotation_step.rotation_step(zeros(2, 512, 512), zeros(2, 512, 512), rate=0.1, steps=1),
        {"gram_kernel": False, "polynomial_kernel": False, "apply_kernel": False},
    ),
)


class _Device:
    """Stands for a GPU of the target's kind, as far as a compilation without launch asks for one."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]


@contextmanager
def compilation(target: str) -> Iterator[list[Any]]:
    """Within the block a launch compiles its kernel for the target, runs nothing, and adds it to the list."""
    compiled: list[Any] = []
    run = JITFunction.run

    def warm_up(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    driver.set_active(_Device(target))
    with mock.patch.object(JITFunction, "run", warm_up):
        yield compiled


@dataclass(frozen=True)
class Resources:
    """What one kernel needs: registers per thread, bytes of stack and shared memory, matrix instructions."""

    kernel: str
    registers: int
    stack: int
    shared: int
    instructions: tuple[str, ...]


def resources(kernel: Any) -> Resources:
    """Reads registers and stack (where spills go) from the binary, instructions from the assembly."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
        registers, stack = numbers["vgpr_count"], numbers["private_segment_fixed_size"]
    else:
        text = kernel.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            report = subprocess.run(
                [BINARIES / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True
            ).stdout
        registers, stack = (int(value) for value in re.findall(r"REG:(\d+) STACK:(\d+)", report)[0])
    instructions = tuple(sorted(set(re.findall(ANY_MATRIX_INSTRUCTION, text))))
    return Resources(kernel.metadata.name, registers, stack, kernel.metadata.shared, instructions)


def measure(form: Form, target: str) -> list[Resources]:
    """Compiles a form; one entry per kernel, the largest numbers where it is launched more than once."""
    with compilation(target) as kernels:
        form.launch()
    largest: dict[str, Resources] = {}
    for found in map(resources, kernels):
        other = largest.get(found.kernel, found)
        largest[found.kernel] = Resources(
            found.kernel,
            max(found.registers, other.registers),
            max(found.stack, other.stack),
            max(found.shared, other.shared),
            tuple(sorted({*found.instructions, *other.instructions})),
        )
    return list(largest.values())


def broken_promises(form: Form, target: str, kernels: list[Resources]) -> list[str]:
    """Says which of the promises of this page's head do not hold."""
    broken = []
    for found in kernels:
        where = f"{form.op} ({form.name}), {found.kernel} for {target}"
        if found.stack:
            broken.append(f"{where}: {found.stack} bytes of stack")
        if form.ieee and target != "gfx942" and found.instructions:
            broken.append(f"{where}: {', '.join(found.instructions)} where IEEE products were asked for")
        if found.kernel in form.matrix:
            expected = MATRIX_INSTRUCTIONS[target][0 if form.matrix[found.kernel] else 1]
            if not any(re.match(expected, instruction) for instruction in found.instructions):
                broken.append(f"{where}: no {expected}, but {', '.join(found.instructions) or 'none'}")
    missing = set(form.matrix) - {found.kernel for found in kernels}
    return broken + [f"{form.op} ({form.name}): {kernel} was not launched" for kernel in sorted(missing)]


def main() -> None:
    """Prints and writes the table; exits with 1 and a list where a promise does not hold."""
    lines = [
        "# Triton kernels: resources",
        "",
        f"Compiled ahead of time by triton {triton.__version__}; nothing here ran on a GPU, and no",
        "speed on one has been measured. Registers per thread (vector registers on gfx942), bytes of stack",
        "(0: nothing is spilled) and of shared memory per block, matrix instructions.",
        "",
        "| op | form | kernel | target | registers | stack | shared | matrix instructions |",
        "|---|---|---|---|---:|---:|---:|---|",
    ]
    broken = []
    for form in FORMS:
        for target in TARGETS:
            kernels = measure(form, target)
            broken += broken_promises(form, target, kernels)
            for found in kernels:
                instructions = ", ".join(f"`{name}`" for name in found.instructions) or "–"
                lines.append(
                    f"| {form.op} | {form.name} | {found.kernel} | {target} | {found.registers} | "
                    f"{found.stack} | {found.shared} | {instructions} |"
                )
    page = "\n".join(lines) + "\n"
    print(page)
    RESULTS.write_text(page)
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
