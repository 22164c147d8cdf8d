"""Build of the native library by CMake; a machine without a C++ compiler gets a pure install.

DIRMERGE_NATIVE = auto (default: build if that works) | require (fail if it does not) | off.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
NATIVE = os.environ.get("DIRMERGE_NATIVE", "auto")
if NATIVE not in ("auto", "require", "off"):
    raise SystemExit(f"DIRMERGE_NATIVE must be auto, require or off, got {NATIVE!r}")


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
            if shutil.which("ninja", path=path):
                configure += ["-G", "Ninja"]
            subprocess.run(configure, cwd=build, check=True, env=environment)
            subprocess.run(["cmake", "--build", "."], cwd=build, check=True, env=environment)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            if NATIVE == "require":
                raise SystemExit(f"the native library was required and did not build: {error}") from error
            sys.stderr.write(
                f"dirmerge: no native library ({error}); everything works without it, slower. "
                "Install a C++17 compiler and reinstall to have it.\n"
            )


def remove_earlier_builds() -> None:
    """An editable install would go on importing the library of an earlier build."""
    for library in (HERE / "dirmerge").glob("_C.*"):
        if library.suffix in (".so", ".pyd"):
            library.unlink()


if NATIVE == "off":
    remove_earlier_builds()
setup(
    ext_modules=[] if NATIVE == "off" else [Extension("dirmerge._C", sources=[], optional=NATIVE == "auto")],
    cmdclass={"build_ext": CMakeBuild},
)
