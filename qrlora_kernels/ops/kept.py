"""Low rank over frozen operands that a layer keeps in the layout of its products as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch.chooser import choose, pinned_backend, run
from ..dispatch.problem import PANELS, Choice, problem_of
from ..operands import KeptOperands, LowRank, LowRankGradient, in_panels
from . import eager
from .checks import (
    asks_for_operators,
    bias_gradient,
    flatten,
    refuse_cast,
    restore,
    wants_gradient,
)
from .low_rank import by_step


class KeptLowRankFunction(torch.autograd.Function):
    """Autograd on x [M, K]; gradients for x, bias and the gate only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        gate: Tensor,
        p: LowRank,
        there: KeptOperands,
        back: KeptOperands | None,
        backend: str | None,
        choice: Choice,
    ) -> Tensor:
        """``p`` has all operands; the first three are those that may ask for a gradient."""
        y: Tensor
        p = p._replace(x=x, bias=bias, gate=gate)
        y, h = run(in_panels(p, there), backend, choice)
        ctx.save_for_backward(p.weight, p.up, p.down, gate, h)
        ctx.scaling, ctx.backend, ctx.back = p.scaling, backend, back
        return y

    @staticmethod
    @eager.backward
    def backward(ctx: Any, dy: Tensor) -> eager.Gradients:
        need_dx, need_dbias, need_dgate, *_ = ctx.needs_input_grad
        dx = dgate = None
        if need_dx or need_dgate:
            weight, up, down, gate, h = ctx.saved_tensors
            operands = (dy, weight, up, down, gate, None, h, ctx.scaling, need_dx, need_dgate)
            if asks_for_operators(dy):
                dx, dgate = by_step(None, operands, ctx.backend)
            else:
                if not weight.dtype == up.dtype == down.dtype == dy.dtype:
                    refuse_cast(dy, weight=weight, up=up, down=down)
                p = LowRankGradient(*operands)._replace(dy=flatten(dy, "dy"))
                dx, dgate = run(in_panels(p, ctx.back) if ctx.back else p, ctx.backend)
        dbias = bias_gradient(dy) if need_dbias else None
        return dx, dbias, dgate, None, None, None, None, None


def kept_low_rank(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate: Tensor,
    scaling: float,
    square: bool,
    kept: Callable[[bool], KeptOperands | None],
) -> Tensor | None:
    """y [..., N] by what is kept; None where another recipe is ahead, or the call is odd.

    The operands are those of ``operands.LowRank``, of which x [..., K], weight and bias fit each
    other; ``square``: whether the gate is to be a core. ``kept(False)`` is what the forward reads,
    ``kept(True)`` the backward, or None.
    """
    if not _factors_fit(x, weight, up, down, gate, square):
        return None
    p = LowRank(flatten(x), weight, bias, up, down, gate, None, float(scaling))
    backend = pinned_backend()
    choice = choose(problem_of(p)._replace(layout="panels"), backend)
    if choice.recipe != PANELS:
        return None
    forward = kept(False)
    if forward is None:
        return None
    if wants_gradient(x, bias, gate):
        both = forward, kept(True)
        y: Tensor = KeptLowRankFunction.apply(p.x, bias, gate, p, *both, backend, choice)
    else:
        y, _ = run(in_panels(p, forward), backend, choice)
    return restore(y, x)


def _factors_fit(
    x: Tensor, weight: Tensor, up: Tensor, down: Tensor, gate: Tensor, square: bool
) -> bool:
    """Whether they may be read as [N, r], [r, K] and [r] or [r, r]; others have their messages."""
    (n, k), r = weight.shape, gate.shape[-1] if gate.ndim else 0
    shapes = (n, r), (r, k), (r, r) if square else (r,)
    return all(
        t.shape == shape and t.dtype == x.dtype and t.device == x.device
        for t, shape in zip((up, down, gate), shapes, strict=True)
    )
