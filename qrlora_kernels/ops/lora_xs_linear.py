"""LoRA-XS: y = x Wᵀ + b + s ((x Aᵀ) C) Bᵀ, saving only h = x Aᵀ [M, r] for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from ..backends.chooser import pinned_backend
from ..reference import lora_xs_linear_ref
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
    core = operands[3]
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], core.shape[0])


def _bwd_fake(dy: Tensor, weight: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    core, (need_dx, need_dcore) = operands[2], operands[5:7]
    dx = dy.new_empty(dy.shape[0], weight.shape[1]) if need_dx else placeholder(dy)
    return dx, core.new_empty(core.shape) if need_dcore else placeholder(dy)


lora_xs_linear_fwd = Operator(
    "lora_xs_linear",
    "fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor core, float scaling, "
    "str? backend) -> (Tensor, Tensor)",
    _fwd_fake,
    weight_at=1,
    trainable_at=5,
)
lora_xs_linear_bwd = Operator(
    "lora_xs_linear",
    "bwd",
    "(Tensor dy, Tensor weight, Tensor a, Tensor b, Tensor core, Tensor h, float scaling, "
    "bool need_dx, bool need_dcore, str? backend) -> (Tensor, Tensor)",
    _bwd_fake,
    weight_at=1,
    trainable_at=4,
)
_direct = DirectLowRank(lora_xs_linear_bwd)


class LoRAXSLinearFunction(torch.autograd.Function):
    """Autograd of the fused operator on x [M, K]; gradients for x, bias and core only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        core: Tensor,
        scaling: float,
        backend: str | None,
    ) -> Tensor:
        y, h = lora_xs_linear_fwd(x, weight, bias, a, b, core, scaling, backend)
        ctx.save_for_backward(weight, a, b, core, h)
        ctx.scaling, ctx.backend = scaling, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_dx, _, need_dbias, _, _, need_dcore, *_ = ctx.needs_input_grad
        dx = dcore = None
        if need_dx or need_dcore:
            dx, dcore = lora_xs_linear_bwd(
                dy, *ctx.saved_tensors, ctx.scaling, need_dx, need_dcore, ctx.backend
            )
        return (
            dx if need_dx else None,
            None,
            bias_gradient(dy) if need_dbias else None,
            None,
            None,
            dcore if need_dcore else None,
            None,
            None,
        )


def lora_xs_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    core: Tensor,
    scaling: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """LoRA-XS over a frozen linear layer (arXiv 2405.17604, eq. 2).

    Equivalent to ``F.linear(x, weight, bias) + scaling * ((x @ a.T) @ core) @ b.T`` with fp32
    accumulation and one rounding of the sum.

    Parameters
    ----------
    x : Tensor [..., K]
        Any number of leading dimensions and any strides; fp16, bf16, fp32 or fp64.
    weight : Tensor [N, K]
    bias : Tensor [N] or None
    a : Tensor [r, K]
        Input side of the frozen basis, Σ_r V_rᵀ.
    b : Tensor [N, r]
        Output side of the frozen basis, U_r.
    core : Tensor [r, r]
        The trainable core; x's dtype, or fp32 over half-precision operands.
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
    y = _direct(backend, x, weight, bias, a, b, core, scaling)
    if y is not None:
        return y
    operands = (x, weight, bias, a, b, core)
    if has_torch_function(operands):
        return handle_torch_function(lora_xs_linear, operands, *operands, scaling, backend=backend)
    check_scaling(scaling)
    check_memory(x=x, weight=weight, bias=bias, a=a, b=b, core=core)
    x, weight, bias, a, b = autocast(x, weight, bias, a, b)
    check_linear(x, weight, bias)
    check_tensor("core", core)
    rank = core.shape[0] if core.dim() == 2 else 0
    check_operand("core", core, (rank, rank), x, or_fp32=True)
    check_operand("a", a, (rank, weight.shape[1]), x)
    check_operand("b", b, (weight.shape[0], rank), x)
    if reason := plain_reason(weight, a, b, trains=(x, bias, core)):
        plain = (x, weight, bias, a, b, core, scaling)
        return run_plain("lora_xs_linear", reason, backend, lora_xs_linear_ref, *plain)
    flat = (flatten(x), weight, bias, a, b, core, float(scaling), pinned_backend(backend))
    fused = (
        LoRAXSLinearFunction.apply(*flat)
        if wants_gradient(x, bias, core)
        else lora_xs_linear_fwd(*flat)[0]
    )
    return restore(fused, x)
