"""QR-LoRA: y = x Wᵀ + b + s (x R̃ᵀ ∘ λ) Qᵀ, saving only h = x R̃ᵀ [M, r] for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from ..backends.chooser import pinned_backend
from ..reference import qr_linear_ref
from .common import (
    autocast,
    bias_gradient,
    check_linear,
    check_memory,
    check_operand,
    check_scaling,
    check_tensor,
    flatten,
    plain_reason,
    restore,
    run_plain,
    wants_gradient,
)
from .direct_low_rank import DirectLowRank
from .operator import Operator, placeholder


def _fwd_fake(x: Tensor, weight: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    lam = operands[3]
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lam.shape[0])


def _bwd_fake(dy: Tensor, weight: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    lam, (need_dx, need_dlam) = operands[2], operands[5:7]
    dx = dy.new_empty(dy.shape[0], weight.shape[1]) if need_dx else placeholder(dy)
    return dx, lam.new_empty(lam.shape) if need_dlam else placeholder(dy)


qr_linear_fwd = Operator(
    "qr_linear",
    "fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor q, Tensor r, Tensor lam, float scaling, "
    "str? backend) -> (Tensor, Tensor)",
    _fwd_fake,
    weight_at=1,
    trainable_at=5,
)
qr_linear_bwd = Operator(
    "qr_linear",
    "bwd",
    "(Tensor dy, Tensor weight, Tensor q, Tensor r, Tensor lam, Tensor h, float scaling, "
    "bool need_dx, bool need_dlam, str? backend) -> (Tensor, Tensor)",
    _bwd_fake,
    weight_at=1,
    trainable_at=4,
)
_direct = DirectLowRank(qr_linear_bwd)


class QRLinearFunction(torch.autograd.Function):
    """Autograd of the fused operator on x [M, K]; gradients for x, bias and lam only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        q: Tensor,
        r: Tensor,
        lam: Tensor,
        scaling: float,
        backend: str | None,
    ) -> Tensor:
        y, h = qr_linear_fwd(x, weight, bias, q, r, lam, scaling, backend)
        ctx.save_for_backward(weight, q, r, lam, h)
        ctx.scaling, ctx.backend = scaling, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_dx, _, need_dbias, _, _, need_dlam, *_ = ctx.needs_input_grad
        dx = dlam = None
        if need_dx or need_dlam:
            dx, dlam = qr_linear_bwd(
                dy, *ctx.saved_tensors, ctx.scaling, need_dx, need_dlam, ctx.backend
            )
        return (
            dx if need_dx else None,
            None,
            bias_gradient(dy) if need_dbias else None,
            None,
            None,
            dlam if need_dlam else None,
            None,
            None,
        )


def qr_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    r: Tensor,
    lam: Tensor,
    scaling: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """QR-LoRA over a frozen linear layer (arXiv 2508.21810, eq. 3).

    Equivalent to ``F.linear(x, weight, bias) + scaling * (x @ r.T * lam) @ q.T`` with fp32
    accumulation and one rounding of the sum.

    Parameters
    ----------
    x : Tensor [..., K]
        Any number of leading dimensions and any strides; fp16, bf16, fp32 or fp64.
    weight : Tensor [N, K]
    bias : Tensor [N] or None
    q : Tensor [N, r]
        Orthonormal columns of the pivoted QR.
    r : Tensor [r, K]
        Its triangular factor with the column permutation undone.
    lam : Tensor [r]
        The trainable diagonal; x's dtype, or fp32 over half-precision operands.
    scaling : float
    backend : str, optional
        Force a backend (see ``qrlora_kernels.backends``) instead of choosing one.

    Returns
    -------
    Tensor [..., N] in x's dtype

    Raises
    ------
    TypeError, ValueError
        If an operand's type, shape, dtype or device does not fit the others; the message names it.
    """
    y = _direct(backend, x, weight, bias, q, r, lam, scaling)
    if y is not None:
        return y
    operands = (x, weight, bias, q, r, lam)
    if has_torch_function(operands):
        return handle_torch_function(qr_linear, operands, *operands, scaling, backend=backend)
    check_scaling(scaling)
    check_memory(x=x, weight=weight, bias=bias, q=q, r=r, lam=lam)
    x, weight, bias, q, r = autocast(x, weight, bias, q, r)
    check_linear(x, weight, bias)
    check_tensor("lam", lam)
    rank = lam.shape[0] if lam.dim() == 1 else -1
    check_operand("lam", lam, (max(rank, 0),), x, or_fp32=True)
    check_operand("q", q, (weight.shape[0], rank), x)
    check_operand("r", r, (rank, weight.shape[1]), x)
    if reason := plain_reason(weight, q, r, trains=(x, bias, lam)):
        plain = (x, weight, bias, q, r, lam, scaling)
        return run_plain("qr_linear", reason, backend, qr_linear_ref, *plain)
    flat = (flatten(x), weight, bias, q, r, lam, float(scaling), pinned_backend(backend))
    fused = (
        QRLinearFunction.apply(*flat) if wants_gradient(x, bias, lam) else qr_linear_fwd(*flat)[0]
    )
    return restore(fused, x)
