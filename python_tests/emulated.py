"""Builds the CUDA kernels for the CPU: their device code, compiled as C++ and run by fibers.

That shows whether the algorithm is right and whether it depends on the order of threads. The PTX
instructions are replaced by functions that follow the PTX manual. It is not a GPU: speed and memory
spaces show there alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
EMULATION = ROOT / "python_tests" / "emulation"
DEVICE = [
    CSRC / "core" / "cuda" / f"{name}.cu"
    for name in ("decode", "panels", "pivot_block", "pivot_choose", "pivoted_qr", "project")
]
# The bindings are compiled with the module: each alone would read pybind11's headers again.
MODULE = EMULATION / "module.cpp"
BINDINGS = [CSRC / "python" / f"{name}.cpp" for name in ("cuda", "cuda_linalg")]
FLAGS = ["-std=c++17", "-O2", "-ftree-vectorize", "-march=native", "-w"]
FLAGS += ["-fPIC", "-fvisibility=hidden"]
FLAGS += ["-fno-strict-aliasing"]  # device code reads vectors of 16 bytes as what they hold


def build(folder: Path) -> ModuleType:
    """The module, built in ``folder`` unless one of the same sources and flags is there.

    Raises
    ------
    FileNotFoundError
        There is no C++ compiler or no pybind11.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler was found")
    if importlib.util.find_spec("pybind11") is None:
        raise FileNotFoundError("pybind11 is not installed")
    import pybind11

    command = [compiler, *FLAGS, f"-I{EMULATION}", f"-I{CSRC / 'core' / 'include'}"]
    command += [
        f"-I{CSRC / 'python'}",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
    ]
    library = folder / _digest(command) / f"emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.parent.mkdir(parents=True, exist_ok=True)
    with _alone(library.parent):
        if not library.is_file():
            _build(command, library)
    return load(library)


def _build(command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:

        def compiled(source: Path) -> Path:
            made = Path(folder, f"{source.stem}.o")
            before = [f"-include{path}" for path in BINDINGS if source == MODULE]
            subprocess.run([*command, *before, "-xc++", "-c", source, "-o", made], check=True)
            return made

        with ThreadPoolExecutor(os.cpu_count()) as compilers:
            made = list(compilers.map(compiled, [MODULE, *DEVICE]))
        fresh = Path(folder, library.name)
        subprocess.run([command[0], "-shared", *made, "-o", fresh], check=True)
        fresh.replace(library)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the others of a test run wait for what it builds."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(library: Path) -> ModuleType:
    """The module that ``build`` left in ``library``."""
    spec = importlib.util.spec_from_file_location("emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _digest(command: list[str]) -> str:
    digest = hashlib.sha256(" ".join([sys.version, *command]).encode())
    folders = (EMULATION, CSRC / "core" / "cuda", CSRC / "core" / "include", CSRC / "python")
    headers = [path for folder in folders for path in folder.rglob("*.*h")]
    for source in sorted({*DEVICE, *BINDINGS, MODULE, *headers}):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
