"""Steps 2 to 4 of the ladder that stands for a GPU: numbers, compilation, prediction. It needs none.

    python -m benchmarks.kernels        prints the table and writes benchmarks/results/kernels.md, roofline.md

2. Every form of every Triton kernel runs in Triton's interpreter, in a process of its own
   (benchmarks.numerics); the CUDA C++ kernels run on the CPU (benchmarks.cuda_kernels).
3. Each form is compiled as its launcher would launch it, for NVIDIA's sm_80 (A100), sm_90 (H100, H200) and
   sm_100 (B200) and AMD's gfx942 (MI300), and what the compiler says of it is read.
4. benchmarks.roofline records what merges launch, and writes its prediction anew.

The run fails where a kernel errs by more than twice torch's own error, uses the stack, as one that spills
registers does, or lacks the matrix instruction it is built on.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks import cuda_kernels, roofline

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kernels.md"
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The instruction that a kernel built on matrix products must contain, for 16-bit and for float32 operands.
MATRIX_INSTRUCTIONS = {
    "sm_80": (r"mma\.sync\S*\.(bf16\.bf16|f16\.f16)", r"mma\.sync\S*\.tf32\.tf32"),
    "sm_90": (r"wgmma\.mma_async\S*\.(bf16\.bf16|f16\.f16)", r"wgmma\.mma_async\S*\.tf32\.tf32"),
    "sm_100": (r"tcgen05\.mma\S*kind::f16", r"tcgen05\.mma\S*kind::tf32"),
    "gfx942": (r"v_mfma_f32_\w+_b?f16", r"v_mfma_f32_\w+_f32"),
}
ANY_MATRIX_INSTRUCTION = r"(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma)[\w.:]*"
# Bytes of shared memory of one of NVIDIA's multiprocessors.
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in (BF16, FP16, FP32, FP64)}

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def normal(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """Normal numbers; their rows are aligned for vector loads where the sizes are multiples of 16."""
    return torch.randn(shape).to(dtype)


@dataclass(frozen=True)
class Form:
    """One way to launch an op.

    Attributes:
        op: name of the op.
        name: what tells this form from the op's others.
        inputs: makes the arguments for matrices of about a given size.
        matrix: per kernel with matrix products, whether its operands have 16 bits.
        odd: whether rows are not aligned, so that elements are addressed one by one.
    """

    op: str
    name: str
    inputs: Callable[[int], Arguments]
    matrix: dict[str, bool] = field(default_factory=dict)
    odd: bool = False

    def arguments(self, size: int) -> Arguments:
        """Makes inputs of a size, a multiple of 16; one less where rows are to be odd."""
        torch.manual_seed(0)
        return self.inputs(size - 1 if self.odd else size)

    def launch(self, size: int) -> Any:
        """Launches the op's kernels on such inputs."""
        launcher = getattr(importlib.import_module(f"dirmerge.triton_kernels.{self.op}"), self.op)
        args, kwargs = self.arguments(size)
        return launcher(*args, **kwargs)


def _sketch(size: int, *, dtype: torch.dtype, given: bool = False, **options: Any) -> Arguments:
    base = normal(size, size, dtype=dtype)
    finetuned = [(base + normal(size, size) / 10).to(dtype) for _ in range(2)]
    test = (normal(2, size, 144),) if given else ()
    return (base, finetuned, *test), {"width": 144, **options}


def _lowrank(size: int, *, base: torch.dtype, factor: torch.dtype) -> Arguments:
    left, right = normal(size, 96, dtype=factor), normal(size, 96, dtype=factor)
    return (normal(size, size, dtype=base), left, right), {"scale": 0.1}


def _polar(size: int, *, dtype: torch.dtype) -> Arguments:
    x = normal(2, size, size) / (2 * size**0.5)
    return (x.to(dtype), 3.4, -4.8, 2.1), {}


def _gram(size: int, *, dtype: torch.dtype) -> Arguments:
    return (normal(2, size, size, dtype=dtype),), {}


def _elect(size: int, *, dtype: torch.dtype) -> Arguments:
    x = normal(4, size, size, dtype=dtype)
    return (x, torch.full((4,), 0.5, dtype=dtype), [1.0, 2.0, 3.0, 4.0]), {}


def _etf(size: int, *, dtype: torch.dtype, K: int) -> Arguments:
    return (normal(4, K, size, dtype=dtype),), {}


def _kth(size: int, *, dtype: torch.dtype) -> Arguments:
    return (normal(4, size, size, dtype=dtype), 99), {}


def _rotation(size: int) -> Arguments:
    rotation = torch.linalg.qr(normal(2, size, size)).Q.contiguous()
    return (rotation, normal(2, size, size) / size**0.5), {"rate": 0.1, "steps": 8}


def _products(form: str, dtype: torch.dtype, **options: Any) -> Form:
    """A form of delta_sketch, with the operands its products are to have."""
    matrix = {"delta_sketch_kernel": not options.get("given", False)}
    odd = form.endswith("odd rows")
    return Form("delta_sketch", form, partial(_sketch, dtype=dtype, **options), matrix, odd)


def _two_sizes(
    op: str, name: str, inputs: Callable[[int], Arguments], matrix: dict[str, bool]
) -> tuple[Form, Form]:
    """A form with aligned rows and one with odd ones."""
    return Form(op, name, inputs, matrix), Form(op, f"{name}, odd rows", inputs, matrix, odd=True)


FORMS = (
    *(
        Form("etf_project", f"{NAMES[dtype]}, K = {K}", partial(_etf, dtype=dtype, K=K))
        for dtype, K in ((BF16, 128), (FP16, 128), (FP32, 128), (FP64, 128), (FP32, 512))
    ),
    *(
        Form("kth_largest_magnitude", NAMES[dtype], partial(_kth, dtype=dtype))
        for dtype in (BF16, FP16, FP32, FP64)
    ),
    *(Form("elect_merge", NAMES[dtype], partial(_elect, dtype=dtype)) for dtype in (BF16, FP16, FP32, FP64)),
    *(
        form
        for dtype in (BF16, FP16, FP32)
        for form in _two_sizes(
            "gram", NAMES[dtype], partial(_gram, dtype=dtype), {"gram_kernel": dtype != FP32}
        )
    ),
    *(
        form
        for name, base, factor in (
            ("bfloat16", BF16, BF16),
            ("float16", FP16, FP16),
            ("bfloat16, float32 factors", BF16, FP32),
            ("float32", FP32, FP32),
        )
        for form in _two_sizes(
            "lowrank_add",
            name,
            partial(_lowrank, base=base, factor=factor),
            {"lowrank_add_kernel": factor != FP32},
        )
    ),
    _products("bfloat16, random", BF16),
    _products("float16, random", FP16),
    _products("float32, random", FP32),
    _products("float32, random, odd rows", FP32),
    _products("bfloat16, given", BF16, given=True),
    _products("float32, given", FP32, given=True),
    _products("float32, given, odd rows", FP32, given=True),
    _products("float32, given, transposed", FP32, given=True, transposed=True),
    *(
        form
        for dtype in (BF16, FP16, FP32)
        for form in _two_sizes(
            "polar_step",
            NAMES[dtype],
            partial(_polar, dtype=dtype),
            {"gram_kernel": dtype == BF16, "polynomial_kernel": False, "apply_kernel": dtype == BF16},
        )
    ),
    Form(
        "rotation_step",
        "float32",
        _rotation,
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
class Row:
    """One kernel of one form for one architecture; CUDA C++ kernels give rows of the same kind.

    Attributes:
        op: name of the op.
        language: "Triton" or "CUDA C++".
        form: how it is launched or instantiated.
        kernel: name of the kernel.
        target: architecture.
        registers: per thread.
        spilled: bytes of stack, where what is spilled goes; None where it was not read.
        shared: bytes of shared memory per block.
        occupancy: warps that a multiprocessor holds of those it could; None where it was not computed.
        instructions: matrix instructions.
    """

    op: str
    language: str
    form: str
    kernel: str
    target: str
    registers: int
    spilled: int | None
    shared: int
    occupancy: float | None
    instructions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Accuracy:
    """The error of a form against float64, max |found − truth| / max |truth|, and torch's in its dtype."""

    error: float
    by_torch: float
    floor: float

    @property
    def is_kept(self) -> bool:
        """Whether the error is at most twice torch's; the floor is for where torch happens to be exact."""
        # Not the negation of >: a NaN is no accuracy.
        return self.error <= 2 * self.by_torch + self.floor


def occupancy(registers: int, warps: int, shared: int, target: str) -> float | None:
    """Warps that fit a multiprocessor of NVIDIA's at once, out of 64; registers go in units of 256 a warp."""
    if target not in SHARED_MEMORY:
        return None
    per_warp = -(-registers * 32 // 256) * 256
    # A block's share of shared memory has a kilobyte that the driver keeps.
    blocks = min(65536 // (per_warp * warps), SHARED_MEMORY[target] // (shared + 1024), 32, 64 // warps)
    return blocks * warps / 64


def resources(kernel: Any, form: Form, target: str) -> Row:
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
    found, shared = kernel.metadata, kernel.metadata.shared
    share = occupancy(registers, found.num_warps, shared, target)
    return Row(
        form.op, "Triton", form.name, found.name, target, registers, stack, shared, share, instructions
    )


def measure(form: Form, target: str, launch: Callable[[int], Any] | None = None) -> list[Row]:
    """Compiles a form; one row per kernel, the largest numbers where it is launched more than once."""
    with compilation(target) as kernels:
        (launch or form.launch)(512)
    largest: dict[str, Row] = {}
    for kernel in kernels:
        found = resources(kernel, form, target)
        other = largest.get(found.kernel, found)
        shares = [share for share in (found.occupancy, other.occupancy) if share is not None]
        largest[found.kernel] = Row(
            *(found.op, found.language, found.form, found.kernel, found.target),
            max(found.registers, other.registers),
            max(found.spilled or 0, other.spilled or 0),
            max(found.shared, other.shared),
            min(shares, default=None),
            tuple(sorted({*found.instructions, *other.instructions})),
        )
    return list(largest.values())


def broken_promises(form: Form, target: str, kernels: list[Row]) -> list[str]:
    """Says which of the promises of this page's head the compiler breaks."""
    broken = []
    for found in kernels:
        where = f"{form.op} ({form.name}), {found.kernel} for {target}"
        if found.spilled:
            broken.append(f"{where}: {found.spilled} bytes of stack")
        if found.kernel in form.matrix:
            expected = MATRIX_INSTRUCTIONS[target][0 if form.matrix[found.kernel] else 1]
            if not any(re.match(expected, instruction) for instruction in found.instructions):
                broken.append(f"{where}: no {expected}, but {', '.join(found.instructions) or 'none'}")
    missing = set(form.matrix) - {found.kernel for found in kernels}
    return broken + [f"{form.op} ({form.name}): {kernel} was not launched" for kernel in sorted(missing)]


def start_numerics(kind: str) -> subprocess.Popen[str]:
    """Starts the process that runs "triton" or "cuda" kernels on the CPU."""
    # Triton decides at its import whether it interprets.
    environment = {**os.environ, "TRITON_INTERPRET": "1" if kind == "triton" else "0"}
    command = [sys.executable, "-m", "benchmarks.numerics", kind]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def read_numerics(process: subprocess.Popen[str]) -> dict[tuple[str, str], Accuracy]:
    """Waits for such a process and returns the accuracy of every form."""
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"the kernels did not run on the CPU: {process.args!r} says why")
    return {(row.pop("op"), row.pop("form")): Accuracy(**row) for row in json.loads(output)}


def wrong_numbers(accuracies: dict[tuple[str, str], Accuracy], language: str) -> list[str]:
    """Says which forms err by more than twice torch's own error."""
    return [
        f"{op} ({form}) in {language}: error {found.error:.1e}, torch's own {found.by_torch:.1e}"
        for (op, form), found in accuracies.items()
        if not found.is_kept
    ]


HEAD = f"""\
# Kernels: resources and numeric errors

Written by `make kernels`; nothing here ran on a GPU, and no speed on one has been measured.

- Triton kernels: compiled ahead of time by triton {triton.__version__}, each form as its launcher launches it
  (512 × 512, 511 × 511 where rows are odd). Numbers: in Triton's interpreter, 96 × 96 or 95 × 95.
- CUDA C++ kernels: compiled by nvcc. Numbers: the same source on the CPU, thread by thread.
- Registers per thread (vector registers on gfx942); bytes spilled (of Triton's kernels the stack, where
  spills go); bytes of shared memory per block; occupancy: warps that a multiprocessor holds, of 64.
- Error: max |found − truth| / max |truth| against float64; beside it torch's own in the same dtype. A run
  fails above twice torch's own plus 6e-8, half a unit of float32, for where torch happens to be exact.
  Float64 is compared with torch's own float64, to 1e-13. Of a CUDA C++ kernel the worst form of a dtype.
"""


def page(rows: list[Row], accuracies: dict[tuple[str, str, str], Accuracy]) -> str:
    """Renders the table; accuracies by language, op and form."""
    columns = (
        *("op", "language", "form", "kernel", "target", "registers", "spilled", "shared", "occupancy"),
        *("matrix instructions", "error", "torch's"),
    )
    marks = "|---|---|---|---|---|---:|---:|---:|---:|---|---:|---:|"
    lines = [HEAD, f"| {' | '.join(columns)} |", marks]
    for row in rows:
        instructions = ", ".join(f"`{name}`" for name in row.instructions) or "–"
        share = "–" if row.occupancy is None else f"{100 * row.occupancy:.0f} %"
        spilled = "–" if row.spilled is None else str(row.spilled)
        found = accuracies.get((row.language, row.op, row.form))
        errors = ("–", "–") if found is None else (f"{found.error:.1e}", f"{found.by_torch:.1e}")
        cells = (
            *(row.op, row.language, row.form, row.kernel, row.target, str(row.registers), spilled),
            *(str(row.shared), share, instructions, *errors),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# What the template arguments of the CUDA C++ kernels say of the dtype; 16-bit numbers share one selection.
TEMPLATE_DTYPES = {
    "BFloat16": (BF16,),
    "Float16": (FP16,),
    "float": (FP32,),
    "double": (FP64,),
    "unsigned short": (BF16, FP16),
    "unsigned int": (FP32,),
    "unsigned long long": (FP64,),
}


def cuda_row(found: cuda_kernels.Row) -> Row:
    """A row of benchmarks.cuda_kernels as one of this page."""
    spilled = max(found.stack, found.spills)
    form = (re.findall(r"<(.*)>", found.kernel) or [""])[0]
    kernel = found.kernel.split("<")[0]
    numbers = found.registers, spilled, found.shared, found.occupancy
    return Row(found.op, "CUDA C++", form, kernel, found.arch, *numbers)


def of_instantiation(row: Row, numbers: dict[tuple[str, str], Accuracy]) -> Accuracy | None:
    """The accuracy of the worst form of the dtype that a CUDA C++ kernel is instantiated for."""
    dtypes = TEMPLATE_DTYPES.get(row.form.split(",")[0], ())
    names = tuple(NAMES[dtype] for dtype in dtypes)
    found = [value for (op, form), value in numbers.items() if op == row.op and form.startswith(names)]
    if not names or not found:
        return None
    return max(found, key=lambda value: value.error / (2 * value.by_torch + value.floor))


def main() -> None:
    """Prints and writes the table; exits with 1 and a list where a promise does not hold."""
    interpreter = start_numerics("triton")
    rows: list[Row] = []
    broken: list[str] = []
    for form in FORMS:
        for target in TARGETS:
            kernels = measure(form, target)
            rows += kernels
            broken += broken_promises(form, target, kernels)
    numbers = read_numerics(interpreter)
    missing = {(form.op, form.name) for form in FORMS} - numbers.keys()
    broken += [f"{op} ({form}) was not computed" for op, form in sorted(missing)]
    broken += wrong_numbers(numbers, "Triton")
    accuracies = {("Triton", *key): found for key, found in numbers.items()}

    emulation = start_numerics("cuda")
    compiled = list(cuda_kernels.rows())
    for found in compiled:
        broken += cuda_kernels.broken_promises(found)
    emulated = read_numerics(emulation)
    broken += wrong_numbers(emulated, "CUDA C++")
    for row in map(cuda_row, compiled):
        rows.append(row)
        worst = of_instantiation(row, emulated)
        if worst is not None:
            accuracies["CUDA C++", row.op, row.form] = worst
    rows.sort(key=lambda row: row.op)
    text = page(rows, accuracies)
    print(text)
    RESULTS.write_text(text)
    roofline.main()
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
