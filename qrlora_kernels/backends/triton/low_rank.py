"""The low-rank operation over a frozen linear layer: a skinny kernel, then a two-phase product."""

from __future__ import annotations

from torch import Tensor

from ...operands import LowRank, LowRankGradient, as_wide_as_the_gate
from . import readable
from .skinny import low_rank_back, low_rank_in
from .two_phase import two_phase


def forward(p: LowRank) -> tuple[Tensor, Tensor]:
    """y [M, N] = x Wᵀ + b + s·(h∘λ or h C) upᵀ and h [M, r] = x downᵀ."""
    p = as_wide_as_the_gate(readable(p))
    assert p.down is not None
    h, scaled = low_rank_in(p.x, p.down, p.gate.contiguous(), p.scaling)
    return two_phase((p.x, p.weight), (scaled, p.up), p.bias), h


def backward(p: LowRankGradient) -> tuple[Tensor | None, Tensor | None]:
    """dx = dy W + s·(g∘λ or g Cᵀ) down and the gate's gradient, g = dy up."""
    if not (p.need_dx or p.need_dgate):
        return None, None
    p = as_wide_as_the_gate(readable(p))
    assert p.down is not None
    scaled, dgate = low_rank_back(p)
    if scaled is None:
        return None, dgate
    dx = two_phase((p.dy, p.weight.t()), (scaled, p.down.t()))
    return dx, dgate
