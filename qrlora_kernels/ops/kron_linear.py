"""OHoRA: y = x Wᵀ + b + s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x, saving only x for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from ..backends.chooser import pinned_backend
from ..reference import kron_linear_ref
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
from .direct_kron import DirectKron
from .operator import Operator, placeholder


def _fwd_fake(x: Tensor, weight: Tensor, *operands: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _bwd_fake(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *operands: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_dx, need_da, need_db = operands[3:6]
    return (
        x.new_empty(x.shape) if need_dx else placeholder(dy),
        a.new_empty(a.shape) if need_da else placeholder(dy),
        b.new_empty(b.shape) if need_db else placeholder(dy),
    )


kron_linear_fwd = Operator(
    "kron_linear",
    "fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor? a0, Tensor? b0, "
    "float scaling, str? backend) -> Tensor",
    _fwd_fake,
    weight_at=1,
    trainable_at=3,
)
kron_linear_bwd = Operator(
    "kron_linear",
    "bwd",
    "(Tensor dy, Tensor x, Tensor weight, Tensor a, Tensor b, Tensor? a0, Tensor? b0, "
    "float scaling, bool need_dx, bool need_da, bool need_db, str? backend) "
    "-> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    weight_at=2,
    trainable_at=3,
)
_direct = DirectKron(kron_linear_bwd)


class KronLinearFunction(torch.autograd.Function):
    """Autograd of the fused operator on x [M, K]; gradients for x, bias, a and b only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        a0: Tensor | None,
        b0: Tensor | None,
        scaling: float,
        backend: str | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b, a0, b0)
        ctx.scaling, ctx.backend = scaling, backend
        return kron_linear_fwd(x, weight, bias, a, b, a0, b0, scaling, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_dx, _, need_dbias, need_da, need_db, *_ = ctx.needs_input_grad
        dx = da = db = None
        if need_dx or need_da or need_db:
            dx, da, db = kron_linear_bwd(
                dy, *ctx.saved_tensors, ctx.scaling, need_dx, need_da, need_db, ctx.backend
            )
        return (
            dx if need_dx else None,
            None,
            bias_gradient(dy) if need_dbias else None,
            da if need_da else None,
            db if need_db else None,
            None,
            None,
            None,
            None,
        )


def kron_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None = None,
    b0: Tensor | None = None,
    scaling: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """A Kronecker update over a frozen linear layer (OHoRA, EMNLP 2025, eq. 6 and 7).

    Equivalent to ``F.linear(x, weight + scaling * (torch.kron(a, b.T) - torch.kron(a0, b0.T)),
    bias)``, computed per token as ``a @ (x.view(r, K/r) @ b)`` without forming the product.

    Parameters
    ----------
    x : Tensor [..., K]
        Any number of leading dimensions and any strides; fp16, bf16, fp32 or fp64.
    weight : Tensor [N, K]
    bias : Tensor [N] or None
    a : Tensor [N/r, r]
    b : Tensor [K/r, r]
        The trainable factors; x's dtype, or fp32 over half-precision operands.
    a0, b0 : Tensor, optional
        The start, shaped and typed as a and b; without it the whole product is added.
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
    y = _direct(backend, x, weight, bias, a, b, a0, b0, scaling)
    if y is not None:
        return y
    operands = (x, weight, bias, a, b, a0, b0)
    if has_torch_function(operands):
        return handle_torch_function(kron_linear, operands, *operands, scaling, backend=backend)
    check_scaling(scaling)
    check_memory(x=x, weight=weight, bias=bias, a=a, b=b, a0=a0, b0=b0)
    x, weight, bias = autocast(x, weight, bias)
    check_linear(x, weight, bias)
    _check_factors(x, weight, a, b, a0, b0)
    if reason := plain_reason(weight, a0, b0, trains=(x, bias, a, b)):
        plain = (x, weight, bias, a, b, a0, b0, scaling)
        return run_plain("kron_linear", reason, backend, kron_linear_ref, *plain)
    flat = (flatten(x), weight, bias, a, b, a0, b0, float(scaling), pinned_backend(backend))
    fused = (
        KronLinearFunction.apply(*flat) if wants_gradient(x, bias, a, b) else kron_linear_fwd(*flat)
    )
    return restore(fused, x)


def _check_factors(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None
) -> None:
    n, k = weight.shape
    check_tensor("a", a)
    rank = a.shape[1] if a.dim() == 2 else 0
    if rank == 0 or n % rank or k % rank:
        raise ValueError(
            f"a must have shape [N/r, r] with r dividing N={n} and K={k}, got {list(a.shape)}"
        )
    if (a0 is None) != (b0 is None):
        raise ValueError("a0 and b0 must be given together, got only one of them")
    factors: dict[str, tuple[Tensor, tuple[int, int]]] = {
        "a": (a, (n // rank, rank)),
        "b": (b, (k // rank, rank)),
    }
    if a0 is not None and b0 is not None:
        factors["a0"], factors["b0"] = (a0, factors["a"][1]), (b0, factors["b"][1])
    for name, (factor, shape) in factors.items():
        check_operand(name, factor, shape, x, or_fp32=True)
        if factor.dtype != a.dtype:
            raise TypeError(f"{name} must have the dtype of a, {a.dtype}, got {factor.dtype}")
