"""The forward and backward steps themselves, for an ``autograd.Function`` or engine of your own.

No argument is checked, no autocast applied, nothing recorded for autograd; the chooser picks the
backend unless the last argument, ``backend``, names one. All of them run under ``torch.compile`` as
one operator::

    y, h = qr_linear_fwd(x, weight, bias, q, r, lam, scaling, backend)
    dx, dlam = qr_linear_bwd(dy, weight, q, r, lam, h, scaling, need_dx, need_dlam, backend)

    y, h = lora_xs_linear_fwd(x, weight, bias, a, b, core, scaling, backend)
    dx, dcore = lora_xs_linear_bwd(
        dy, weight, a, b, core, h, scaling, need_dx, need_dcore, backend)

    y, h = low_rank_fwd(x, weight, bias, up, down, gate, index, scaling, backend)
    dx, dgate = low_rank_bwd(
        dy, weight, up, down, gate, index, h, scaling, need_dx, need_dgate, backend)

    y = kron_linear_fwd(x, weight, bias, a, b, a0, b0, scaling, backend)
    dx, da, db = kron_linear_bwd(
        dy, x, weight, a, b, a0, b0, scaling, need_dx, need_da, need_db, backend)

    y = linear_add_fwd(x, weight, bias, addend, backend)

``low_rank`` is what QR-LoRA (up = q, down = r, gate = λ [r]) and LoRA-XS (up = b, down = a, gate =
core [r, r]) both are. With ``index`` [M] of int64 there are many gates, [A, r] or [A, r, r], and
each row names its own; without ``down``, h = (x Wᵀ) up. Factors may be wider than the gate.

Shapes are those of ``qrlora_kernels.operands``: x [M, K], dy and y [M, N], h [M, r]; bias, a0 with
b0, and backend may be None. Any strides and any alignment are right; rows that are contiguous and,
on CUDA, 16-byte aligned are fast. fp16, bf16, fp32 and fp64, one dtype for x, weight, bias and
frozen factors; trainables may be fp32 over half precision, and their gradients come in their own
dtype. A gradient not asked for comes as an empty tensor. h has x's
dtype, and fp32 over fp16, whose range it may leave.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .ops.kron import kron_bwd as kron_linear_bwd
from .ops.kron import kron_fwd as kron_linear_fwd
from .ops.linear_add import linear_add_fwd
from .ops.low_rank import low_rank_bwd, low_rank_fwd

__all__ = [
    "kron_linear_bwd",
    "kron_linear_fwd",
    "linear_add_fwd",
    "lora_xs_linear_bwd",
    "lora_xs_linear_fwd",
    "low_rank_bwd",
    "low_rank_fwd",
    "qr_linear_bwd",
    "qr_linear_fwd",
]


def qr_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, q: Tensor, r: Tensor, lam: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """y and h; then scaling and backend."""
    y, h = low_rank_fwd(x, weight, bias, q, r, lam, None, *rest)
    return y, h


def qr_linear_bwd(
    dy: Tensor, weight: Tensor, q: Tensor, r: Tensor, lam: Tensor, h: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """dx and dλ; then scaling, need_dx, need_dlam and backend."""
    dx, dlam = low_rank_bwd(dy, weight, q, r, lam, None, h, *rest)
    return dx, dlam


def lora_xs_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, core: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """y and h; then scaling and backend."""
    y, h = low_rank_fwd(x, weight, bias, b, a, core, None, *rest)
    return y, h


def lora_xs_linear_bwd(
    dy: Tensor, weight: Tensor, a: Tensor, b: Tensor, core: Tensor, h: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """dx and dC; then scaling, need_dx, need_dcore and backend."""
    dx, dcore = low_rank_bwd(dy, weight, b, a, core, None, h, *rest)
    return dx, dcore
