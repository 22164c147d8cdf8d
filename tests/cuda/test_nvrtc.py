"""dirmerge.backends.nvrtc with a CuPy of our own, whose modules are the kernels emulated on the CPU.

It takes the same calls as CuPy's: source, options and names of kernels in; grid, block and NumPy scalars at a
launch. What it runs is what dirmerge.backends.nvrtc chose, so the results must be those of the compiled
launchers to the bit.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulation import CSRC, FLAGS, Emulated

from dirmerge.backends import cuda, nvrtc

SHIM = """
#include "cuda/launch.h"
{includes}
using namespace dirmerge::cuda;

template <typename... P, std::size_t... I>
int run(void (*kernel)(P...), unsigned blocks, unsigned threads, void** arguments, const std::size_t* sizes,
        std::index_sequence<I...>) {{
    const bool fits = ((sizes[I] == sizeof(P)) && ...) && sizes[sizeof...(P)] == 0;
    if (!fits) return INVALID_VALUE;
    return simt::launch(dim3(blocks), dim3(threads), 0,
                        [=] {{ kernel(*static_cast<P*>(arguments[I])...); }});
}}

template <typename... P>
int run(void (*kernel)(P...), unsigned blocks, unsigned threads, void** arguments,
        const std::size_t* sizes) {{
    return run(kernel, blocks, threads, arguments, sizes, std::index_sequence_for<P...>());
}}

DIRMERGE_EXPORT int run_kernel(const char* name, unsigned blocks, unsigned threads, void** arguments,
                               const std::size_t* sizes) {{
    const std::string wanted = name;
{cases}
    return -1;
}}
"""


def matrices(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


PROBLEMS: dict[str, Callable[[], Any]] = {
    "elect_merge": lambda: cuda.elect_merge(matrices(3, 40, 40, dtype=torch.bfloat16), matrices(3).abs()),
    "elect_merge, odd": lambda: cuda.elect_merge(matrices(2, 33, 33), None, [0.5, 2.0]),
    "etf_project": lambda: cuda.etf_project(matrices(2, 40, 33, dtype=torch.float16)),
    "etf_project, long": lambda: cuda.etf_project(matrices(200, 70).double()),
    "gram": lambda: cuda.gram(matrices(2, 70, 130)),
    "gram, bfloat16": lambda: cuda.gram(matrices(40, 66, dtype=torch.bfloat16).mT),
    "kth_largest_magnitude": lambda: cuda.kth_largest_magnitude(matrices(3, 4096), 1000),
    "kth_largest_magnitude, odd": lambda: cuda.kth_largest_magnitude(matrices(2, 333).half(), 17),
}


class FakeCuPy:
    """What dirmerge.backends.nvrtc uses of CuPy, and what it asked for."""

    __version__ = "14.2.0"

    def __init__(self, run: Callable[..., int] | None = None) -> None:
        self.run = run
        self.launches: list[tuple[str, int, int]] = []
        self.compiled: list[tuple[str, tuple[str, ...]]] = []
        self.streams: list[tuple[int, int]] = []
        self.codes: list[str] = []
        self.cuda = types.SimpleNamespace(
            Device=lambda index: nullcontext(),
            Stream=types.SimpleNamespace(from_external=self._stream),
            compiler=types.SimpleNamespace(CompileException=type("CompileException", (Exception,), {})),
            nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)),
        )

    def _stream(self, stream: Any) -> nullcontext[None]:
        self.streams.append(stream.__cuda_stream__())
        return nullcontext()

    def RawModule(self, code: str, options: tuple[str, ...], name_expressions: tuple[str, ...]) -> Any:  # noqa: N802
        (name,) = name_expressions
        self.compiled.append((name, options))
        self.codes.append(code)
        return types.SimpleNamespace(get_function=lambda wanted: FakeKernel(self, name, wanted))


class FakeKernel:
    def __init__(self, cupy: FakeCuPy, name: str, wanted: str) -> None:
        assert wanted == name
        self.cupy = cupy
        self.name = name

    def __call__(self, grid: tuple[int], block: tuple[int], args: tuple[Any, ...]) -> None:
        (blocks,), (threads,) = grid, block
        self.cupy.launches.append((self.name, blocks, threads))
        if self.cupy.run is None:
            return
        held = [np.array([value]) for value in args]
        assert all(value.dtype == type(arg) for value, arg in zip(held, args, strict=True))
        addresses = (ctypes.c_void_p * len(held))(*(value.ctypes.data for value in held))
        sizes = (ctypes.c_size_t * (len(held) + 1))(*(value.itemsize for value in held), 0)
        code = self.cupy.run(self.name.encode(), blocks, threads, addresses, sizes)
        if code:
            raise RuntimeError(f"error {code} of {self.name}")


def library(cupy: FakeCuPy) -> nvrtc.Library:
    return nvrtc.Library(cupy, str(cuda.sources()))


@pytest.fixture(scope="module")
def emulated_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """Every kernel that the problems launch, callable by name."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the CUDA kernels are emulated by a C++20 compiler, and there is no g++")
    recorder = FakeCuPy()
    with pytest.MonkeyPatch.context() as patch:
        recording = library(recorder)
        patch.setattr(cuda, "library", lambda: recording)
        for problem in PROBLEMS.values():
            problem()
    names = sorted({name for name, _ in recorder.compiled})
    folder = tmp_path_factory.mktemp("shim")
    headers = sorted((CSRC / "cuda").glob("*.cuh"))
    arguments = "blocks, threads, arguments, sizes"
    source = SHIM.format(
        includes="\n".join(f'#include "cuda/{header.name}"' for header in headers),
        cases="\n".join(f'    if (wanted == "{name}") return run({name}, {arguments});' for name in names),
    )
    (folder / "shim.cpp").write_text(source)
    flags = [flag for flag in FLAGS if flag != "-Wextra"]
    command = [
        compiler,
        *flags,
        f"-I{CSRC}",
        "-shared",
        str(folder / "shim.cpp"),
        "-o",
        str(folder / "shim.so"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run: Callable[..., int] = ctypes.CDLL(str(folder / "shim.so")).run_kernel
    return run


def last_launch(emulated: Emulated) -> tuple[int, int]:
    blocks, threads = ctypes.c_uint(), ctypes.c_uint()
    found = ctypes.CDLL(str(emulated.library.path)).dirmerge_simt_last_launch
    found(ctypes.byref(blocks), ctypes.byref(threads))
    return blocks.value, threads.value


def flat(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_launches_what_the_compiled_launcher_does(
    problem: str, emulated: Emulated, emulated_run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = flat(PROBLEMS[problem]())
    geometry = last_launch(emulated)
    cupy = FakeCuPy(emulated_run)
    by_nvrtc = library(cupy)
    monkeypatch.setattr(cuda, "library", lambda: by_nvrtc)
    found = flat(PROBLEMS[problem]())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert cupy.launches[-1][1:3] == geometry
    # A kernel is compiled once.
    PROBLEMS[problem]()
    assert len(cupy.compiled) == len({name for name, _ in cupy.compiled})
    assert set(cupy.streams) == {(0, 0)}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.usefixtures("emulated")
def test_the_callers_default_device_does_not_matter(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[Any, torch.Tensor] = {}

    def once(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return made.setdefault((shape, dtype), torch.randn(shape).to(dtype))

    monkeypatch.setitem(globals(), "matrices", once)
    expected = PROBLEMS[problem]()
    # "meta" stands for a GPU: a tensor that is made without its device lands there and holds nothing.
    with torch.device("meta"):
        assert torch.equal(PROBLEMS[problem](), expected)


def test_every_kernel_of_the_library_is_launched_here() -> None:
    launchers = {path.stem for path in (CSRC / "cuda").glob("*.cu")} - {"library"}
    assert set(nvrtc.LAUNCHES) == launchers
    assert {problem.partition(",")[0] for problem in PROBLEMS} == launchers


def test_sizes_are_those_of_the_sources(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    lines = [f'#include "cuda/{path.name}"' for path in (CSRC / "cuda").glob("*.cuh")]
    lines.append("using namespace dirmerge::cuda;")
    for scope, sizes in nvrtc.SIZES.items():
        lines += [f"static_assert({scope}::{name} == {value});" for name, value in sizes.items()]
    for bits, digits in nvrtc.DIGITS.items():
        digit = f"kth_largest_magnitude::DIGITS_{bits}"
        lines.append(f"static_assert(sizeof({digit}) / sizeof(int) == {len(digits)});")
        lines += [f"static_assert({digit}[{i}] == {value});" for i, value in enumerate(digits)]
    for size in (2, 4, 8):
        element = {2: "Float16", 4: "float", 8: "double"}[size]
        lines.append(f"static_assert(elect_merge::WIDE<{element}> == {min(4, 16 // size)});")
        lines.append(f"static_assert(WIDEST<{element}> == {16 // size});")
    lines.append("static_assert(sizeof(KthState) == 16);")
    (tmp_path / "sizes.cpp").write_text("\n".join(lines))
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{CSRC}", str(tmp_path / "sizes.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_workspaces_are_those_of_the_library(emulated: Emulated) -> None:
    for function in nvrtc.WORKSPACES:
        for size in (1, 7, 4096):
            assert library(FakeCuPy()).size(function, size) == emulated.library.size(function, size)


def test_a_changed_header_is_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # CuPy keeps what it compiled by its source text and options.
    shutil.copytree(cuda.sources(), tmp_path / "sources")
    cupy = FakeCuPy()
    for change in ("", "// changed"):
        with (tmp_path / "sources" / "elements.cuh").open("a") as header:
            header.write(change)
        changed = nvrtc.Library(cupy, str(tmp_path / "sources"))
        monkeypatch.setattr(cuda, "library", lambda changed=changed: changed)
        cuda.gram(torch.zeros(3, 3))
    assert cupy.codes[0] != cupy.codes[1]
    assert all(code.endswith('#include "gram.cuh"\n') for code in cupy.codes)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_nvrtc_compiles_every_kernel_that_is_launched(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
    cupy = FakeCuPy()
    recording = library(cupy)
    monkeypatch.setattr(cuda, "library", lambda: recording)
    for problem in PROBLEMS.values():
        problem()
    assert len(cupy.codes) > len(PROBLEMS)
    success = bindings.nvrtcResult.NVRTC_SUCCESS
    for op in nvrtc.LAUNCHES:
        found = [
            entry for entry, code in zip(cupy.compiled, cupy.codes, strict=True) if f'"{op}.cuh"' in code
        ]
        code = next(code for code in cupy.codes if f'"{op}.cuh"' in code)
        program = bindings.nvrtcCreateProgram(code.encode(), b"kernel.cu", 0, [], [])[1]
        for name, _ in found:
            assert bindings.nvrtcAddNameExpression(program, name.encode())[0] == success
        options = [f"--gpu-architecture={arch.replace('sm', 'compute')}", *found[0][1]]
        result = bindings.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[
            0
        ]
        # One byte more: Python has a single object for every one-byte string, and NVRTC writes into it.
        log = b" " * (bindings.nvrtcGetProgramLogSize(program)[1] + 1)
        bindings.nvrtcGetProgramLog(program, log)
        assert result == success, log.decode()
        for name, _ in found:
            assert bindings.nvrtcGetLoweredName(program, name.encode())[0] == success


def test_a_failure_names_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        return 9

    failing = library(FakeCuPy(fail))
    monkeypatch.setattr(cuda, "library", lambda: failing)
    with pytest.raises(RuntimeError, match=r"gram: the CUDA kernel was not launched: error 9"):
        cuda.gram(torch.zeros(3, 3))


def test_it_says_what_it_is_and_why_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library(FakeCuPy()).build_info() == {
        "compiler": "NVRTC 13.0 by CuPy 14.2.0",
        "built_for": "this GPU, on first use",
    }
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert nvrtc.load("folder") == (
        None,
        "NVRTC could compile the kernels by CuPy: pip install dirmerge[cupy]",
    )


def test_it_serves_where_no_compiled_library_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    by_nvrtc = library(FakeCuPy())
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nvrtc, "load", lambda folder: (by_nvrtc, ""))
    load = cuda._load.__wrapped__
    assert load() == (by_nvrtc, "")
    monkeypatch.setattr(nvrtc, "load", lambda folder: (None, "no CuPy"))
    assert load()[0] is None
    assert re.fullmatch(r"the CUDA library is not built: .*; no CuPy", load()[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CuPy" not in load()[1]
