"""y = x Wᵀ + b + addend in one rounding: the base product accumulates on a given update.

For an adapter whose update is computed apart (with dropout on its input, or one that is not in this
package). In half precision ``F.linear(x, W, b) + update`` loses an update that is small against y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from ..backends.chooser import pinned_backend
from ..reference import linear_add_ref
from .common import (
    autocast,
    bias_gradient,
    check_linear,
    check_memory,
    check_operand,
    flatten,
    plain_reason,
    restore,
    run_plain,
    wants_gradient,
)
from .operator import Operator


def _fwd_fake(x: Tensor, weight: Tensor, *operands: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


linear_add_fwd = Operator(
    "linear_add",
    "fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor addend, str? backend) -> Tensor",
    _fwd_fake,
    weight_at=1,
    trainable_at=3,
)


class LinearAddFunction(torch.autograd.Function):
    """Autograd of the fused sum on x [M, K]; gradients for x, bias and addend; x is not saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        addend: Tensor,
        backend: str | None,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        return linear_add_fwd(x, weight, bias, addend, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_dx, _, need_dbias, need_daddend, _ = ctx.needs_input_grad
        (weight,) = ctx.saved_tensors
        check_memory(dy=dy, weight=weight)
        return (
            dy @ weight if need_dx else None,
            None,
            bias_gradient(dy) if need_dbias else None,
            dy if need_daddend else None,
            None,
        )


def linear_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """``F.linear(x, weight, bias) + addend`` with fp32 accumulation and one rounding.

    Parameters
    ----------
    x : Tensor [..., K]
        Any number of leading dimensions and any strides; fp16, bf16, fp32 or fp64.
    weight : Tensor [N, K]
    bias : Tensor [N] or None
    addend : Tensor [..., N]
        In x's dtype.
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
    operands = (x, weight, bias, addend)
    if has_torch_function(operands):
        return handle_torch_function(linear_add, operands, *operands, backend=backend)
    check_memory(x=x, weight=weight, bias=bias, addend=addend)
    x, weight, bias, addend = autocast(x, weight, bias, addend)
    check_linear(x, weight, bias)
    check_operand("addend", addend, (*x.shape[:-1], weight.shape[0]), x)
    if reason := plain_reason(weight, trains=(x, bias, addend)):
        plain = (x, weight, bias, addend)
        return run_plain("linear_add", reason, backend, linear_add_ref, *plain)
    flat = (flatten(x), weight, bias, flatten(addend), pinned_backend(backend))
    fused = (
        LinearAddFunction.apply(*flat) if wants_gradient(x, bias, addend) else linear_add_fwd(*flat)
    )
    return restore(fused, x)
