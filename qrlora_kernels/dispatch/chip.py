"""The names of the chips that work runs on, as measurements are filed under them."""

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
        known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        isa = [flag for flag in known if re.search(rf"\b{flag}\b", text)]
        if name:
            return " ".join([name[1].strip(), *isa])
    return platform.processor() or platform.machine()
