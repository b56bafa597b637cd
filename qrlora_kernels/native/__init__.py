"""The compiled core ``qrlora_kernels._C``, or the reason why it is not there."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch  # loaded first, so that the core shares its OpenMP runtime


def _load() -> tuple[ModuleType | None, str]:
    note = Path(__file__).parents[1] / "_build_note.txt"
    try:
        core = importlib.import_module("qrlora_kernels._C")
    except ImportError as error:
        if note.is_file():
            return None, note.read_text().strip()
        return None, f"native core not importable: {error}"
    return core, "native core built with " + core.build_config()["compiler"]


CORE, REASON = _load()
# Element types as csrc/core/include/qrlora/dtype.h numbers them.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
# Compute capabilities that the binary holds code for (CMakeLists.txt, QRLORA_CUDA_ARCHS).
_CUDA_MAJORS = (8, 9, 10)


def core() -> ModuleType:
    """The native core; ``RuntimeError`` with the reason where there is none."""
    if CORE is None:
        raise RuntimeError(REASON)
    return CORE


def instructions() -> str:
    """The instruction set of the CPU kernels in use; "" without a core."""
    return "" if CORE is None else str(CORE.columns[CORE.best_column()])


def build_config() -> dict[str, str]:
    """What the native core was built from and for, read from the binary; empty without one."""
    return {} if CORE is None else dict(CORE.build_config())


def runs_on(device: torch.device) -> tuple[bool, str]:
    """Whether the CUDA part holds code for this CUDA device, and in a few words why not."""
    if torch.version.cuda is None:
        return False, "torch is not built for CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in _CUDA_MAJORS:
        return False, f"not built for compute capability {major}.{minor}"
    return True, build_config()["cuda"]
