"""y = x Wᵀ + b + addend in one rounding: the base product accumulates on a given update.

For an adapter whose update is computed apart (with dropout on its input, or one that is not in this
package). In half precision ``F.linear(x, W, b) + update`` loses an update that is small against y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..autocast import autocast
from ..dispatch.chooser import pinned_backend
from ..operands import LinearAdd
from ..reference import linear_add_ref
from . import flops
from .checks import (
    autograd_reason,
    bias_gradient,
    by_autograd,
    check_linear,
    check_memory,
    check_operand,
    flatten,
    restore,
    wants_gradient,
)
from .operator import Operator, y_without_data

linear_add_fwd = Operator(
    "linear_add_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor addend, str? backend) -> Tensor",
    LinearAdd,
    y_without_data,
    flops.linear_add,
)


class LinearAddFunction(torch.autograd.Function):
    """Autograd of the sum on x [M, K]; gradients for x, bias and addend; x is not saved."""

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


def call(
    x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor, backend: str | None
) -> Tensor:
    """y with the checks and their messages."""
    check_memory(x=x, weight=weight, bias=bias, addend=addend)
    x, weight, bias, addend = autocast(x, weight, bias, addend)
    check_linear(x, weight, bias)
    check_operand("addend", addend, (*x.shape[:-1], weight.shape[0]), x)
    p = LinearAdd(x, weight, bias, addend)
    trains = (x, bias, addend)
    if reason := autograd_reason((weight,), trains):
        return by_autograd("linear_add", reason, backend, linear_add_ref, p)
    flat = (flatten(x), weight, bias, flatten(addend))
    if wants_gradient(*trains):
        y: Tensor = LinearAddFunction.apply(*flat, pinned_backend(backend))
    else:
        y = linear_add_fwd(*flat, backend)
    return restore(y, x)
