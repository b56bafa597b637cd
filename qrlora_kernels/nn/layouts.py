"""The product of a frozen layer by its weight in oneDNN's layout, forward or both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from ..packed import Packed, packs, pays
from . import base_weight
from .derived import Derived

if TYPE_CHECKING:
    from .prepacked import Kept

Directions = Literal["forward", "both"]


def product(layer: nn.Module, directions: Directions, found: Kept) -> Tensor | None:
    """y [..., N] = x Wᵀ + b; None where the layout is no gain, or a call goes without it."""
    x, matrix = found.x, found.matrix
    (n, k), m = matrix.shape, x.numel() // matrix.shape[1]
    if x.device.type != "cpu" or not (pays(m, n, k, x.dtype) and packs(x.dtype)):
        return None
    there = _kept(layer, "forward", found)
    if there is None or x.shape[-1] != k:
        return None
    rows = x.reshape(m, k)
    if torch.is_grad_enabled() and x.requires_grad:
        back = _kept(layer, "backward", found) if directions == "both" else None
        y: Tensor = _Product.apply(rows, matrix, found.bias, there, back)
    elif torch.is_grad_enabled() and found.bias is not None and found.bias.requires_grad:
        return None
    else:
        y = there.product(rows, found.bias)
    return y.view(*x.shape[:-1], n)


def _kept(layer: nn.Module, direction: str, found: Kept) -> Packed | None:
    weight, dtype, wide = cast(Tensor, layer.weight), found.dtype, found.x.dtype
    turn = base_weight.is_conv1d(layer) != (direction == "backward")

    def build(weight: Tensor) -> Packed:
        matrix = weight.to(dtype).to(wide)
        return Packed(matrix.t() if turn else matrix)

    name = f"{direction} layout in {dtype} as {wide}"
    kept: Packed | None = cast(Derived, layer.derived).get(name, build, weight)
    return kept


class _Product(torch.autograd.Function):
    """Of x [M, K]; the weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None, there: Packed, back: Packed | None
    ) -> Tensor:
        ctx.save_for_backward(matrix)
        ctx.back = back
        return there.product(x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (matrix,) = ctx.saved_tensors
        need_dx, _, need_dbias, *_ = ctx.needs_input_grad
        dx = None
        if need_dx and (ctx.back is None or torch.is_grad_enabled()):
            dx = torch.mm(dy, matrix)  # which may be asked for a derivative of its own
        elif need_dx:
            dx = ctx.back.product(dy.contiguous())
        return dx, None, dy.sum(0) if need_dbias else None, None, None
