"""Compiles every CUDA C++ kernel by nvcc and by NVRTC and reads what the compilers say of it; needs no GPU.

    python -m benchmarks.cuda_kernels         prints the table; exits with 1 where a promise does not hold

The promises: nothing is spilled, no stack is used, and as many blocks fit an SM as the kernel's launch bounds
ask for, by registers, static shared memory and threads.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
OPS = tuple(sorted(path.stem for path in SOURCES.glob("*.cu") if path.stem != "library"))


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks on one SM share, by the CUDA C++ Programming Guide's table of compute capabilities."""

    threads: int = 2048
    blocks: int = 32
    registers: int = 65536
    shared: int = 228 << 10


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(shared=164 << 10),
    "sm_90": Multiprocessor(),
    "sm_100": Multiprocessor(),
}


@dataclass(frozen=True)
class Row:
    """One kernel, as instantiated, on one architecture.

    Attributes:
        op: name of the op.
        kernel: the kernel with its template arguments.
        arch: the architecture, sm_80 for instance.
        registers: of a thread.
        stack: bytes of a thread, where spills go.
        spills: bytes that are stored and loaded for want of registers.
        shared: bytes of static shared memory of a block.
        threads: of a block, by the launch bounds.
        designed_blocks: on an SM, by the launch bounds.
        blocks: that fit an SM, without dynamic shared memory.
        occupancy: share of the SM's threads that `blocks` fill.
        symbol: the kernel's mangled name.
    """

    op: str
    kernel: str
    arch: str
    registers: int
    stack: int
    spills: int
    shared: int
    threads: int
    designed_blocks: int
    blocks: int
    occupancy: float
    symbol: str


@functools.cache
def find_nvcc() -> str | None:
    """The nvcc of the pinned wheel before any other, so that the table does not depend on the machine."""
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    folders = [*sorted(wheels.glob("cu*/bin"), reverse=True), Path(os.environ.get("CUDA_HOME", "/")) / "bin"]
    for path in (*map(str, folders), None):
        found = shutil.which("nvcc", path=path)
        if found:
            return found
    return None


def nvcc_missing() -> str:
    """Why nothing can be compiled; empty if it can."""
    return "" if find_nvcc() else "no nvcc: requirements-dev.txt has one as a wheel, which needs no GPU"


def _blocks(sm: Multiprocessor, threads: int, registers: int, shared: int) -> int:
    """How many blocks fit an SM: registers are given out by 8 to each thread, shared memory by 128 bytes."""
    warps = -(-threads // 32)
    by_registers = sm.registers // (-(-registers // 8) * 8 * 32 * warps)
    # Each block takes 1 KiB of shared memory for the system.
    by_shared = sm.shared // (-(-shared // 128) * 128 + 1024)
    return min(sm.blocks, sm.threads // threads, by_registers, by_shared)


def compile_op(op: str, arch: str) -> list[Row]:
    """Compiles csrc/cuda/<op>.cu for one architecture, and reads ptxas's report."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(nvcc_missing())
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / f"{op}.ptx"
        compute = arch.replace("sm_", "compute_")
        options = ["-std=c++17", "-O3", f"-I{SOURCES.parent}"]
        subprocess.run(
            [nvcc, *options, "-ptx", f"-arch={compute}", SOURCES / f"{op}.cu", "-o", ptx], check=True
        )
        cubin = Path(folder) / "cubin"
        assemble: list[str | Path] = [nvcc, "-cubin", f"-arch={arch}", "-Xptxas=-v", ptx, "-o", cubin]
        report = subprocess.run(assemble, check=True, capture_output=True, text=True).stderr
        text = ptx.read_text()
    bounds = {
        symbol: (int(threads), int((re.findall(r"\.minnctapersm (\d+)", rest) or ["1"])[0]))
        for symbol, threads, rest in re.findall(
            r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)[^\n]*\n([^{]*)\{", text
        )
    }
    rows = []
    for entry in report.split("Compiling entry function")[1:]:
        symbol = re.findall(r"'(\w+)'", entry)[0]
        # ptxas reports the functions that a kernel calls without inlining after the kernel itself.
        stack, stores, loads = (int(n) for n in re.findall(r"(\d+) bytes (?:stack|spill)", entry)[:3])
        registers = int(re.findall(r"Used (\d+) registers", entry)[0])
        shared = int((re.findall(r"(\d+) bytes smem", entry) or ["0"])[0])
        threads, designed = bounds[symbol]
        sm = MULTIPROCESSORS[arch]
        blocks = _blocks(sm, threads, registers, shared)
        rows.append(
            Row(
                op,
                _demangled(symbol),
                arch,
                registers,
                stack,
                stores + loads,
                shared,
                threads,
                designed,
                blocks,
                blocks * threads / sm.threads,
                symbol,
            )
        )
    return sorted(rows, key=lambda row: row.kernel)


def _demangled(symbol: str) -> str:
    """The kernel's name and template arguments, without the namespace of the kernels and the parameters."""
    name = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout.strip()
    name = name.removeprefix("void ").replace("dirmerge::cuda::", "")
    return re.split(r"\((?!\w+\))", name)[0]


def rows(archs: tuple[str, ...] = tuple(MULTIPROCESSORS)) -> Iterator[Row]:
    """Every kernel as instantiated, on every architecture."""
    for op in OPS:
        for arch in archs:
            yield from compile_op(op, arch)


def broken_promises(row: Row) -> list[str]:
    """Says which of the promises of this page's head do not hold."""
    where = f"{row.op}: {row.kernel} for {row.arch}"
    broken = []
    if row.stack or row.spills:
        broken.append(f"{where}: {row.stack} bytes of stack, {row.spills} bytes spilled")
    if row.blocks < row.designed_blocks:
        broken.append(f"{where}: {row.blocks} blocks on an SM, designed for {row.designed_blocks}")
    return broken


def compile_nvrtc(op: str, arch: str, kernels: tuple[str, ...]) -> dict[str, str]:
    """Compiles csrc/cuda/<op>.cuh by NVRTC to machine code, as CuPy's path does, without any header but ours.

    Args:
        op: name of the op.
        arch: sm_80 for instance.
        kernels: the instantiations to make, as in Row.kernel.

    Returns:
        Kernel → mangled name in the machine code.

    Raises:
        RuntimeError: NVRTC refuses the source; with its log.
    """
    from cuda.bindings import nvrtc

    def checked(result: tuple[object, ...]) -> object:
        code, *values = result
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{op} for {arch}: {code}")
        return values[0] if values else None

    source = f'#include "{op}.cuh"\n'.encode()
    program = checked(nvrtc.nvrtcCreateProgram(source, f"{op}.cu".encode(), 0, [], []))
    expressions = [re.sub(r"\b([A-Z]\w+|\w+_kernel)\b", r"dirmerge::cuda::\1", kernel) for kernel in kernels]
    for expression in expressions:
        checked(nvrtc.nvrtcAddNameExpression(program, expression.encode()))
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", f"-I{SOURCES}".encode()]
    code = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        # One byte more: Python has a single object for every one-byte string, and NVRTC writes into it.
        log = b" " * (1 + int(str(checked(nvrtc.nvrtcGetProgramLogSize(program)))))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{op} for {arch}: {log.decode()}")
    cubin = b" " * int(str(checked(nvrtc.nvrtcGetCUBINSize(program))))
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    names = {}
    for kernel, expression in zip(kernels, expressions, strict=True):
        name = checked(nvrtc.nvrtcGetLoweredName(program, expression.encode()))
        assert isinstance(name, bytes)
        if name not in cubin:
            raise RuntimeError(f"{op} for {arch}: {kernel} is not in the machine code")
        names[kernel] = name.decode()
    return names


def main() -> None:
    """Prints the table; exits with 1 and a list where a promise does not hold."""
    print("| op | kernel | target | registers | stack | shared | threads | blocks per SM | occupancy |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    broken = []
    for row in rows():
        broken += broken_promises(row)
        print(
            f"| {row.op} | {row.kernel} | {row.arch} | {row.registers} | {row.stack} | {row.shared} | "
            f"{row.threads} | {row.blocks} | {row.occupancy:.0%} |"
        )
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
