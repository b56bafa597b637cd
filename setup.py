"""Drive CMake from setuptools.

The package works without its native core, so a failed or impossible native build is reported in
one plain sentence, kept for ``python -m qrlora_kernels``, and does not fail the installation.
All sources and compiler flags are listed in CMakeLists.txt alone.

Environment:
  QRLORA_BUILD_NATIVE=0   skip the native core; =require fails the installation instead of going on
  QRLORA_BUILD_CUDA=0|1   leave the CUDA part out, or fail without it (default: build it if nvcc)
  QRLORA_CUDA_ARCHS=...   CMake architecture list (default "80-real;90a-real;100-real")
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NATIVE = os.environ.get("QRLORA_BUILD_NATIVE", "1")


class CMakeExtension(Extension):
    """An extension whose sources are known to CMake alone."""

    def __init__(self, name: str) -> None:
        # optional=True lets an editable installation go on without the library.
        super().__init__(name, sources=[], optional=NATIVE != "require")


class CMakeBuild(build_ext):
    """Configure and build CMakeLists.txt, or leave a note that says why not."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        note = library.parent / "_build_note.txt"
        library.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        try:
            if NATIVE == "0":
                raise RuntimeError("QRLORA_BUILD_NATIVE=0 asked to leave it out")
            self._run_cmake(library.parent)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if NATIVE == "require":
                raise
            reason = f"native core not built: {_one_line(error)}"
            note.write_text(reason + "\n")
            print(
                f"qrlora_kernels: {reason}; installing the pure PyTorch package.", file=sys.stderr
            )

    def _run_cmake(self, out_dir: Path) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("CMake was not found")
        build_dir = Path(self.build_temp).resolve() / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "-S", str(ROOT),
            "-B", str(build_dir),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DQRLORA_VERSION={self.distribution.get_version()}",
            f"-DQRLORA_BUILD_CUDA={os.environ.get('QRLORA_BUILD_CUDA', 'AUTO')}",
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        if archs := os.environ.get("QRLORA_CUDA_ARCHS"):
            configure.append(f"-DQRLORA_CUDA_ARCHS={archs}")
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_dir), "--parallel"], check=True)


def _one_line(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        step = (
            "compiling"
            if "--build" in error.cmd
            else "configuring (is a C++17 compiler installed?)"
        )
        return f"CMake failed while {step}, exit status {error.returncode}"
    return " ".join(str(error).split())


setup(ext_modules=[CMakeExtension("qrlora_kernels._C")], cmdclass={"build_ext": CMakeBuild})
