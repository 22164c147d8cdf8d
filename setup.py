"""Build of the native libraries by CMake; a machine without a C++ compiler gets a pure install.

DIRMERGE_NATIVE = auto (default: build if that works) | require (fail if it does not) | off.
DIRMERGE_CUDA   = the same for the CUDA library, which needs nvcc and a C++ compiler, and no GPU. nvcc is
                  looked for in CUDA_HOME, on PATH, and in the wheel nvidia-cuda-nvcc.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
CUDA_LIBRARY = "libdirmerge_cuda.so"


def setting(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "require", "off"):
        raise SystemExit(f"{name} must be auto, require or off, got {value!r}")
    return value


NATIVE = setting("DIRMERGE_NATIVE")
CUDA = setting("DIRMERGE_CUDA")
if CUDA == "require" and NATIVE == "off":
    raise SystemExit("DIRMERGE_CUDA=require builds native code: DIRMERGE_NATIVE must not be off")


def find_nvcc() -> str | None:
    """Returns the path of nvcc; the compiler decides, not whether this machine has a GPU."""
    wheels = [Path(sysconfig.get_paths()[key]) / "nvidia" for key in ("purelib", "platlib")]
    folders = [
        *([Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []),
        *map(Path, os.environ.get("PATH", os.defpath).split(os.pathsep)),
        *(folder for wheel in wheels for folder in sorted(wheel.glob("cu*/bin"), reverse=True)),
    ]
    for folder in folders:
        found = shutil.which("nvcc", path=str(folder))
        if found:
            return found
    return None


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt; under `auto` a failed build leaves a pure-Python install."""

    def build_extension(self, ext: Extension) -> None:
        remove_earlier_builds()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build.mkdir(parents=True, exist_ok=True)
        # cmake and ninja may be scripts of a virtual environment that is not activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        environment = {**os.environ, "PATH": path}
        try:
            import pybind11

            configure = [
                "cmake",
                str(HERE),
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DDIRMERGE_OUTPUT_DIR={target.parent}",
            ]
            nvcc = None if CUDA == "off" else find_nvcc()
            configure.append(f"-DDIRMERGE_NVCC={nvcc or ''}")
            if shutil.which("ninja", path=path):
                configure += ["-G", "Ninja"]
            subprocess.run(configure, cwd=build, check=True, env=environment)
            subprocess.run(["cmake", "--build", "."], cwd=build, check=True, env=environment)
            if CUDA != "off":
                build_cuda(nvcc, build, environment)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            if "require" in (NATIVE, CUDA):
                raise SystemExit(f"the native library was required and did not build: {error}") from error
            sys.stderr.write(
                f"dirmerge: no native library ({error}); everything works without it, slower. "
                "Install a C++17 compiler and reinstall to have it.\n"
            )

    def copy_extensions_to_source(self) -> None:
        """An editable install copies what it knows as an extension; the CUDA library is none."""
        super().copy_extensions_to_source()
        library = Path(self.build_lib) / "dirmerge" / CUDA_LIBRARY
        if library.exists():
            shutil.copy2(library, HERE / "dirmerge" / CUDA_LIBRARY)


def build_cuda(nvcc: str | None, build: Path, environment: dict[str, str]) -> None:
    """Builds the CUDA library; without it, under `auto`, everything else is installed."""
    try:
        if nvcc is None:
            raise FileNotFoundError("no nvcc in CUDA_HOME, on PATH or in the wheel nvidia-cuda-nvcc")
        command = ["cmake", "--build", ".", "--target", "dirmerge_cuda"]
        subprocess.run(command, cwd=build, check=True, env=environment)
    except (OSError, subprocess.CalledProcessError) as error:
        if CUDA == "require":
            raise SystemExit(f"the CUDA library was required and did not build: {error}") from error
        sys.stderr.write(f"dirmerge: no CUDA library ({error}); torch and Triton serve CUDA tensors.\n")


def remove_earlier_builds() -> None:
    """An editable install would go on importing the libraries of an earlier build."""
    package = HERE / "dirmerge"
    for library in [*package.glob("_C.*"), package / CUDA_LIBRARY]:
        if library.suffix in (".so", ".pyd"):
            library.unlink(missing_ok=True)


if NATIVE == "off":
    remove_earlier_builds()
setup(
    ext_modules=[] if NATIVE == "off" else [Extension("dirmerge._C", sources=[], optional=NATIVE == "auto")],
    cmdclass={"build_ext": CMakeBuild},
)
