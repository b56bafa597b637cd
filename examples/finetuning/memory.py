"""Peak memory of this process, or of what it holds on an accelerator."""

from __future__ import annotations

import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_memory(device: str = "cpu") -> int | None:
    """The largest resident size of this process so far, in bytes; None where it is not known.

    Linux keeps VmHWM for the program itself; ``ru_maxrss``, the fallback, also counts the parent
    it was started from. For a device "cuda" it is what PyTorch allocated there.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
