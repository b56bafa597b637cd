"""QR-LoRA and LoRA-XS over a frozen linear layer: a skinny kernel, then one two-phase product."""

from __future__ import annotations

from torch import Tensor

from . import common
from .skinny import low_rank_back, low_rank_in
from .two_phase import two_phase


def gated_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_factor: Tensor,
    in_factor: Tensor,
    gate: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b + s·(h∘λ or h C) out_factorᵀ and h = x in_factorᵀ.

    ``gate`` is λ [r] or C [r, r]; ``out_factor`` [N, r], ``in_factor`` [r, K].
    """
    x, weight, bias, out_factor, in_factor, gate = common.readable(
        x, weight, bias, out_factor, in_factor, gate
    )
    h, scaled = low_rank_in(x, in_factor, gate.contiguous(), scaling)
    return two_phase(x, weight, scaled, out_factor, bias), h


def gated_bwd(
    dy: Tensor,
    weight: Tensor,
    out_factor: Tensor,
    in_factor: Tensor,
    gate: Tensor,
    h: Tensor,
    scaling: float,
    need_dx: bool,
    need_dgate: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = dy W + s·(g∘λ or g Cᵀ) in_factor and the gate's gradient, g = dy out_factor."""
    if not need_dx and not need_dgate:
        return None, None
    dy, weight, out_factor, in_factor, gate, h = common.readable(
        dy, weight, out_factor, in_factor, gate, h
    )
    gate, h = gate.contiguous(), h.contiguous()
    scaled, dgate = low_rank_back(
        dy, out_factor.t(), gate, h, scaling, need_scaled=need_dx, need_grad=need_dgate
    )
    dx = None if scaled is None else two_phase(dy, weight.t(), scaled, in_factor.t())
    return dx, dgate
