"""Products by frozen weights that a layer keeps in the layout of its kernel, forward or both ways.

That is the native one's or oneDNN's; an adapted layer keeps its factors as well, in the former.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from .. import packed, panels
from ..adapters.low_rank import LowRank
from ..dispatch.problem import PANELS
from ..functional import asks_for_operators
from ..operands import Kept as KeptMatrix
from . import base_weight
from .derived import Derived

if TYPE_CHECKING:
    from .adapted import Adapted
    from .layer import AdapterLinear
    from .prepacked import Kept

Directions = Literal["forward", "both"]
Layout = panels.Panels | packed.Packed
LEAST_WORK = 1 << 25  # multiplications: below, what the layer asks takes longer than it saves


def _layout(m: int, n: int, k: int, dtype: torch.dtype) -> type[Layout] | None:
    """The layout by which a product of so many tokens is faster."""
    if panels.used(dtype):
        return panels.Panels if panels.pays(m, n, k, dtype) else None
    return packed.Packed if packed.pays(m, n, k, dtype) and packed.packs(dtype) else None


def product(layer: nn.Module, directions: Directions, found: Kept) -> Tensor | None:
    """y [..., N] = x Wᵀ + b; None where the layout is no gain, or a call goes without it."""
    if not _fit(found):
        return None
    x, matrix, bias = found.x, found.matrix, found.bias
    (n, k), m = matrix.shape, x.numel() // max(1, matrix.shape[1])
    layout = _layout(m, n, k, x.dtype)
    if layout is None:
        return None
    there = _laid(layer, layout, found)
    if there is None:
        return None
    rows = x if x.ndim == 2 else x.reshape(m, k)
    if torch.is_grad_enabled() and x.requires_grad:
        back = _laid(layer, layout, found, turned=True) if directions == "both" else None
        y: Tensor = _Product.apply(rows, matrix, bias, there[0], back and back[0])
    elif torch.is_grad_enabled() and bias is not None and bias.requires_grad:
        return None
    else:
        y = there[0].product(rows, bias)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], n)


def keeps(layer: Adapted, dtype: torch.dtype, step: str) -> bool:
    """Whether this step of an adapted layer has its frozen operands in panels, in ``dtype``."""
    if layer._packed is None or (step == "bwd" and layer._packed == "forward"):
        return False
    if layer.adapter.frozen_of(layer.options, step) is None:
        return False
    if layer._adds_update() or layer.weight.device.type != "cpu":
        return False
    return panels.used(dtype) and not layer._quantised


def may_pay(layer: AdapterLinear, x: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> bool:
    """Whether so much is multiplied that the chooser is worth asking, and takes what is kept.

    Where something is kept already the native call is told whether to take it.
    """
    adapter, (n, k) = layer.adapter, (layer.out_features, layer.in_features)
    if issubclass(adapter, LowRank) and getattr(layer, adapter.gate).ndim == 0:
        return False
    dtype, wide = dtypes
    if not panels.used(wide):
        return False
    tokens = x.numel() // max(1, k)
    if tokens * n * k < LEAST_WORK and not panels.pays_adapted(tokens, n, k, wide):
        return False
    kept = layer.derived.has(_name(dtype, wide, False))
    return kept or layer.explain(tokens).recipe == PANELS


def adapted(layer: AdapterLinear, found: Kept) -> Tensor | None:
    """The adapted layer's y [..., N], likewise; ``found.tensors`` are in the product's dtype."""
    adapter, x = layer.adapter, found.x
    if not (_fit(found) and keeps(layer, x.dtype, "fwd")):
        return None

    def laid(backward: bool) -> tuple[KeptMatrix, ...] | None:
        if backward and layer._packed == "forward":
            return None
        factors = adapter.frozen_of(layer.options, "bwd" if backward else "fwd")
        assert factors is not None  # as of the forward
        kept = _laid(layer, panels.Panels, found, backward, factors)
        return cast("tuple[KeptMatrix, ...] | None", kept)

    return adapter.fused_of_kept(x, found.matrix, found.bias, found.tensors, layer._strength, laid)


def _fit(found: Kept) -> bool:
    """Whether a kernel may read x [..., K], W [N, K] and b [N]; others have their answer or error.

    PyTorch takes bias [1] too, and a sparse x.
    """
    x, matrix, bias = found.x, found.matrix, found.bias
    if x.device.type != "cpu" or x.layout is not torch.strided or x.is_nested:
        return False
    if x.ndim == 0 or matrix.ndim != 2 or x.shape[-1] != matrix.shape[1]:
        return False
    return bias is None or (bias.shape == matrix.shape[:1] and bias.device == x.device)


class _Laid(tuple[Layout, ...]):
    """The weight of a layer, and factors after it, in the layout of their product."""

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self)


def _laid(
    layer: nn.Module,
    layout: type[Layout],
    found: Kept,
    turned: bool = False,
    factors: tuple[str, ...] = (),
) -> _Laid | None:
    """Those that the layer keeps, ``turned`` for dx; None where a call goes without."""
    if torch._C._len_torch_function_stack():
        return None  # a mode is to see the call, and sees no kernel
    dtype, wide = found.dtype, found.x.dtype

    def build(weight: Tensor, *others: Tensor) -> _Laid:
        weight = weight.t() if base_weight.is_conv1d(layer) else weight
        matrices = (t.to(dtype).to(wide) for t in (weight, *others))
        return _Laid(layout(matrix.t() if turned else matrix) for matrix in matrices)

    sources = [cast(Tensor, layer.weight)]
    if factors:
        tensors = cast("AdapterLinear", layer)._tensors()
        sources += [tensors[name] for name in factors]
    return cast(Derived, layer.derived).get(_name(dtype, wide, turned), build, *sources)


@functools.cache
def _name(dtype: torch.dtype, wide: torch.dtype, turned: bool) -> str:
    return f"laid out {'for dx' if turned else 'for y'} in {dtype} as {wide}"


class _Product(torch.autograd.Function):
    """Of x [M, K]; the weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None, there: Layout, back: Layout | None
    ) -> Tensor:
        ctx.save_for_backward(matrix)
        ctx.back = back
        return there.product(x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (matrix,) = ctx.saved_tensors
        need_dx, _, need_dbias, *_ = ctx.needs_input_grad
        dx = None
        if need_dx and (ctx.back is None or torch.is_grad_enabled() or asks_for_operators(dy)):
            dx = torch.mm(dy, matrix)  # which may be asked for a derivative of its own
        elif need_dx:
            dx = ctx.back.product(dy.contiguous())
        return dx, None, dy.sum(0) if need_dbias else None, None, None
