"""What a layer shows of itself, what it asks the backends to do, and which of them does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch

from ..adapters.options import one_of
from ..autocast import autocast_enabled
from ..backends import Choice, Problem, choose

if TYPE_CHECKING:
    from .layer import AdapterLinear

Step = Literal["fwd", "bwd"]


def shown(layer: AdapterLinear, base: str) -> str:
    """The layer in one line, after the line ``base`` of the class that it had."""
    base = base or f"in_features={layer.in_features}, out_features={layer.out_features}"
    merged = ", merged" if layer.merged else ""
    return (
        f"{base}, rank={layer.rank}, scaling={layer.scaling:g}, "
        f"trained={layer.trained_parameters()}{merged}"
    )


def explain(layer: AdapterLinear, tokens: int, step: Step) -> Choice:
    asked = problem(layer, tokens, step)
    if layer.merged:
        return Choice("merged", "a plain linear layer with the update inside its weight")
    return choose(asked)


def problem(layer: AdapterLinear, tokens: int, step: Step) -> Problem:
    one_of("step", step, get_args(Step))  # both steps are one choice
    n, k, device, dtype = layer.out_features, layer.in_features, layer.weight.device, _dtype(layer)
    if layer._adds_update():
        return Problem("linear_add", device, dtype, tokens, n, k, n)
    return Problem(layer.operation, device, dtype, tokens, n, k, layer.rank)


def _dtype(layer: AdapterLinear) -> torch.dtype:
    """That of a call's operands: autocast recasts all but fp64."""
    dtype, device = layer.weight.dtype, layer.weight.device.type
    if dtype == torch.float64 or not autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)
