"""Whether half-precision products are worth asking for: not every CPU has them."""

from __future__ import annotations

import functools

import torch


@functools.cache
def multiplies(device: str, dtype: torch.dtype) -> bool:
    """Whether the library has products of ``dtype`` on this kind of device: on a CPU oneDNN's.

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
