"""What a layer shows of itself, what it asks the backends to do, and which of them does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..dispatch.chooser import choose
from ..dispatch.problem import Choice, Problem, joined, layout_of
from . import dequantising, layouts, prepacked

if TYPE_CHECKING:
    from .adapted import Adapted


def shown(layer: Adapted, base: str) -> str:
    """The layer in one line, after the line ``base`` of the class that it had."""
    base = base or f"in_features={layer.in_features}, out_features={layer.out_features}"
    merged = ", merged" if layer.merged else ""
    return (
        f"{base}, rank={layer.rank}, scaling={layer.scaling:g}, "
        f"trained={layer.trained_parameters()}{merged}"
    )


def explain(layer: Adapted, tokens: int, step: str) -> Choice:
    if layer.merged:
        return Choice("merged", "", "a plain linear layer with the update inside its weight")
    return choose(problem(layer, tokens, step))


def problem(layer: Adapted, tokens: int, step: str) -> Problem:
    if step not in steps(layer):
        raise ValueError(f"step must be one of {steps(layer)} for this layer, got {step!r}")
    n, k, dtype = layer.out_features, layer.in_features, _dtype(layer)
    op, r, form = layer.operation, layer.rank, layer.options.form
    if layer._adds_update():
        op, r, form = "linear_add", n, "two_sided"
    layout = "rows"  # a quantised weight is dequantised so
    if layouts.keeps(layer, dtype, step):
        layout = "panels"
    elif not layer._quantised:
        layout = layout_of(layer.matrix())
    device, bias = layer.weight.device, layer.bias is not None
    return joined(
        Problem(op, device, dtype, tokens, n, k, r, step, form=form, layout=layout, bias=bias)
    )


def steps(layer: Adapted) -> tuple[str, ...]:
    """Those that backends are asked for: the gradients of a sum are plain products."""
    return ("fwd",) if layer._adds_update() else ("fwd", "bwd")


def _dtype(layer: Adapted) -> torch.dtype:
    """That of a call's operands: autocast recasts all but fp64."""
    if layer._quantised:
        return dequantising.dtype_in(layer)
    dtype, product = prepacked.dtypes(layer.weight)
    return product if layer._prepack else dtype
