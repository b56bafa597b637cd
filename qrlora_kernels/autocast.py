"""Autocast, as PyTorch's linear layers obey it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a device type; the meta device knows none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def outside_autocast(device: str) -> AbstractContextManager[Any]:
    """A block in which nothing is recast."""
    return torch.autocast(device, enabled=False) if autocast_enabled(device) else nullcontext()


def autocast(*tensors: Tensor | None) -> Sequence[Any]:
    """Cast as autocast casts the operands of ``F.linear``: all but fp64, to the autocast dtype."""
    # What is no tensor is named by the checks, which come after.
    first = tensors[0]
    device = first.device.type if isinstance(first, Tensor) else "cpu"
    if not autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    ]
