"""Bytes: what a forward keeps for its backward, the peak of a step, and an adapter on disk."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(forward: Callable[[], Tensor], x: Tensor) -> int:
    """Bytes that the graph of ``forward()`` keeps alive: activations, and x where it is kept.

    Weights, factors and whatever else lived before the call are not counted.
    """
    before = {_storage(t) for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)}
    before.discard(_storage(x))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in before:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    del y
    return sum(kept.values())


def _storage(tensor: Tensor) -> int:
    # A trace's tensors are wrappers without memory, and may lie about; a packed weight's is opaque.
    strided = tensor.layout == torch.strided
    none = tensor.is_meta or not strided or torch._is_functional_tensor(tensor)
    return 0 if none else tensor.untyped_storage().data_ptr()


def peak_bytes(step: Callable[[], Any], device: str, warm: bool = True) -> int | None:
    """The most memory that ``step()`` held beyond what was there before it.

    On a GPU by torch's allocator. On a CPU by the system's count of resident pages, so that what
    compiled kernels and libraries take is in it; None where there is no such count (not Linux with
    glibc).
    Two equal runs differ by up to a MiB: counts are kept per core, and pages of code come and go.

    Parameters
    ----------
    step : callable
    device : "cpu" or "cuda"
    warm : bool
        Run the step once before: what it then keeps for later calls is not counted.
    """
    if device == "cuda":
        return _peak_on_gpu(step, warm)
    if _LIBC is None or not hasattr(_LIBC, "mallopt"):
        return None
    with _blocks_on_pages_of_their_own(_LIBC):
        if warm:
            step()
        gc.collect()
        _LIBC.malloc_trim(0)
        try:
            _CLEAR_REFS.write_text("5")  # the high-water mark falls to what is resident now
            before, code = _resident("VmRSS"), _resident("RssFile")
            step()
            # Pages of code that the step was the first to use are not its memory.
            return max(0, _resident("VmHWM") - before - (_resident("RssFile") - code))
        except OSError:
            return None


def _peak_on_gpu(step: Callable[[], Any], warm: bool) -> int:
    if warm:
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - base


_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_LIBC = ctypes.CDLL(None) if os.name == "posix" else None
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    found = re.search(rf"^{field}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(found[1]) * 1024


@contextlib.contextmanager
def _blocks_on_pages_of_their_own(libc: ctypes.CDLL) -> Iterator[None]:
    """Else freed blocks stay resident, to be reused by chance, and gaps between them grow."""
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)
    try:
        yield
    finally:  # where glibc's own adjustment ends in a process that frees large tensors
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 64 << 20)


def disk_bytes(save: Callable[[Path], object]) -> int:
    """Size of the tensors' file that ``save(folder)`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
