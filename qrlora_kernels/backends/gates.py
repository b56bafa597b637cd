"""The gate between two products of the library: h and g through it, its gradient, and W + ΔW."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operands import LowRank, LowRankGradient
from ..reference import accumulation_dtype
from ..segments import products_by_adapter, sum_by_adapter, through_cores
from .products import column_dots, gram, times


def effective_weight(p: LowRank | LowRankGradient) -> Tensor:
    """W + s up Cᵀ down [N, K], or W + s (up ∘ λ) down.

    With more tokens than features it takes fewer operations than the tokens' way through r.
    """
    assert p.down is not None
    gate = times(p.scaling, p.gate)
    if gate.ndim == 1:
        return torch.addmm(p.weight, p.up * gate, p.down)
    # Not up Cᵀ first: MKL's bits of that depend on where in memory the factor lies.
    return torch.addmm(p.weight, p.up, torch.mm(gate.mT.to(p.down.dtype), p.down))


def through_gate(h: Tensor, gate: Tensor, index: Tensor | None, scaling: float) -> Tensor:
    """s (h ∘ λ) or s h C in h's dtype; the former multiplied in λ's."""
    if index is None and gate.ndim == 2:
        return torch.mm(h, times(scaling, gate).to(h.dtype))
    if gate.ndim == 3:
        assert index is not None
        return through_cores(h, gate, index, scaling)
    if index is not None:
        gate = gate[index]  # first: nothing is done to the gates of adapters in no row
    scaled = h * times(scaling, gate)
    return scaled if scaled.dtype == h.dtype else scaled.to(h.dtype)


def back_through_gate(g: Tensor, gate: Tensor, index: Tensor | None, scaling: float) -> Tensor:
    """s (g ∘ λ) or s g Cᵀ, likewise."""
    if index is None and gate.ndim == 2:
        return F.linear(g, times(scaling, gate).to(g.dtype))
    return through_gate(g, gate.mT if gate.ndim == 3 else gate, index, scaling)


def gate_gradient(p: LowRankGradient, g: Tensor) -> Tensor:
    if p.index is None:
        return gram(p.h, g) if p.gate.ndim == 2 else column_dots(p.h, g)
    wide = accumulation_dtype(g.dtype)
    h, adapters = p.h.to(wide), p.gate.shape[0]
    if p.gate.ndim == 3:
        return products_by_adapter(h, g.to(wide), p.index, adapters)
    return sum_by_adapter(h * g, p.index, adapters)
