"""Bytes: what a forward keeps for its backward, the peak of a step, and an adapter on disk."""

from __future__ import annotations

import contextlib
import gc
import os
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
    return 0 if tensor.is_meta or tensor.is_sparse else tensor.untyped_storage().data_ptr()


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """The most memory that ``step()`` held beyond what was there before it, by torch's allocator.

    Scratch that compiled kernels take from the system directly is not seen on a CPU.
    """
    step()  # first-call allocations do not count
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - base
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _without_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """The profiler's library logs its own start and stop to the descriptor, whatever one asks."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def disk_bytes(save: Callable[[Path], object]) -> int:
    """Size of the tensors' file that ``save(folder)`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
