"""Build of the native library: setup.py drives CMake, and a machine without a C++ compiler gets a pure install.

DIRMERGE_NATIVE = auto (default: build when a compiler is there) | require (fail without one) | off.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = os.environ.get("DIRMERGE_NATIVE", "auto")
if NATIVE not in ("auto", "require", "off"):
    raise SystemExit(f"DIRMERGE_NATIVE must be auto, require or off, got {NATIVE!r}")


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt; under `auto` a failed build leaves a pure-Python install."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build.mkdir(parents=True, exist_ok=True)
        import pybind11

        configure = [
            "cmake",
            str(Path(__file__).resolve().parent),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDIRMERGE_OUTPUT_DIR={target.parent}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        try:
            subprocess.run(configure, cwd=build, check=True)
            subprocess.run(["cmake", "--build", "."], cwd=build, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if NATIVE == "require":
                raise SystemExit(f"the native library was required and did not build: {error}") from error
            self.announce(
                f"dirmerge: no native library ({error}); everything works without it, slower. "
                "Install a C++17 compiler and reinstall to have it.",
                level=3,
            )


setup(
    ext_modules=[] if NATIVE == "off" else [Extension("dirmerge._C", sources=[], optional=NATIVE == "auto")],
    cmdclass={"build_ext": CMakeBuild},
)
