"""y = y₀ + s · gate(x downᵀ) upᵀ in one rounding, onto a base product that somebody else made.

Three plain products: where the base product is not ours there is nothing to fuse them with, and
autograd keeps h [M, r] of them and not x.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from ..autocast import autocast, outside_autocast
from ..reference import accumulation_dtype, hidden_dtype
from .checks import FLOATING, check_memory, check_operand, check_scaling, check_tensor


def call(y0: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor, scaling: float) -> Tensor:
    """y with the checks and their messages."""
    check_scaling(scaling)
    check_memory(y0=y0, x=x, a=a, b=b, gate=gate)
    for name, tensor in {"y0": y0, "x": x, "a": a, "b": b, "gate": gate}.items():
        check_tensor(name, tensor)
    x, a, b = autocast(x, a, b)
    rank = _check(y0, x, a, b, gate)
    dtype = accumulation_dtype(x.dtype)
    with outside_autocast(x.device.type):
        down, up = a[:rank].to(hidden_dtype(x.dtype)), b[:, :rank].to(dtype)
        h = linear(x.to(down.dtype), down).to(dtype)
        gated = h * gate if gate.ndim == 1 else h @ gate.to(dtype)
        return (y0.to(dtype) + linear(scaling * gated, up)).to(x.dtype)


def _check(y0: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> int:
    """The rank."""
    if x.dtype not in FLOATING:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    rank = gate.shape[-1] if gate.ndim in (1, 2) else 0
    if not gate.ndim or list(gate.shape) != [rank] * gate.ndim:
        raise ValueError(f"gate must have shape [r] or [r, r], got {list(gate.shape)}")
    check_operand("gate", gate, gate.shape, x, or_fp32=True)
    width = rank
    if a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] > rank:
        width = a.shape[0]
    if x.ndim == 0:
        raise ValueError("x must have shape [..., K], got []")
    n = b.shape[0] if b.ndim == 2 else 0
    check_operand("a", a, (width, x.shape[-1]), x)
    check_operand("b", b, (n, width), x)
    shape = (*x.shape[:-1], n)
    check_operand("y0", y0, shape, x, or_fp32=True)
    return rank
