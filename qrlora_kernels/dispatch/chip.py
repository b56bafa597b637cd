"""The chips that work runs on: their names, as measurements are filed under, and what they lack."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

import torch


@functools.cache
def chip_name(device: torch.device) -> str:
    """A GPU's name; of a CPU its model and the instruction sets that the kernels look for."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu() if device.type == "cpu" else device.type


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        text = info.read_text(encoding="utf-8")
        name = re.search(r"model name\s*:\s*(.*)", text)
        # A virtual machine may hide what the model has.
        isa = [flag for flag in ("avx2", "avx512f", "amx_bf16") if re.search(rf"\b{flag}\b", text)]
        if name:
            return " ".join([name[1].strip(), *isa])
    return platform.processor() or platform.machine()


@functools.cache
def multiplies(device: str, dtype: torch.dtype) -> bool:
    """Whether the library has products of halves on this kind of device: on a CPU oneDNN's.

    Where it has none PyTorch takes a plain loop.
    """
    if device != "cpu":
        return True
    one = torch.ones(32, 32, dtype=dtype, device="cpu")
    try:
        y = torch.ops.mkldnn._linear_pointwise.binary(one, one, one, one[0], "add")
    except (AttributeError, RuntimeError):
        return False
    return bool((y == 34).all())
