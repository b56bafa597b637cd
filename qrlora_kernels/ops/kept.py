"""The operations over frozen operands that a layer keeps in the layout of its products as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autocast import outside_autocast
from ..dispatch.chooser import choose, pinned_backend, run
from ..dispatch.problem import PANELS, Choice, problem_of
from ..operands import (
    Kept,
    KeptOperands,
    LowRank,
    LowRankGradient,
    in_panels,
    low_rank,
    low_rank_gradient,
)
from ..reference import accumulation_dtype
from . import eager, kron
from .checks import (
    asks_for_operators,
    bias_gradient,
    flatten,
    refuse_change,
    restore,
    wants_gradient,
)
from .low_rank import backward_call, by_step, forward_call


class KeptLowRankFunction(torch.autograd.Function):
    """Autograd on x [..., K]; gradients for x, bias and the gate only."""

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
        made: tuple[Tensor, Tensor] | Choice,
    ) -> Tensor:
        """``p`` has all operands; the first three are those that may ask for a gradient. ``made``:
        y and h where a native call has made them, or who is to make them."""
        if isinstance(made, Choice):
            made = _made(p._replace(x=x, bias=bias, gate=gate), there, backend, made)
        y, h = made
        ctx.save_for_backward(p.weight, p.up, p.down, gate, h)
        ctx.scaling, ctx.backend, ctx.back = p.scaling, backend, back
        assert p.down is not None
        ctx.forms = (
            (p.weight.shape, p.weight.dtype), (p.up.shape, p.up.dtype),
            (p.down.shape, p.down.dtype), (gate.shape, gate.dtype),
        )  # fmt: skip
        return y

    @staticmethod
    @eager.backward
    def backward(ctx: Any, dy: Tensor) -> eager.Gradients:
        need_dx, need_dbias, need_dgate, *_ = ctx.needs_input_grad
        dx = dgate = None
        if need_dx or need_dgate:
            weight, up, down, gate, h = ctx.saved_tensors
            if ctx.forms != (
                (weight.shape, weight.dtype), (up.shape, up.dtype),
                (down.shape, down.dtype), (gate.shape, gate.dtype),
            ):  # fmt: skip
                refuse_change(ctx.forms, weight=weight, up=up, down=down, gate=gate)
            operands = (dy, weight, up, down, gate, None, h, ctx.scaling, need_dx, need_dgate)
            kept = (*operands, ctx.back)
            done = eager.ask(backward_call, low_rank_gradient, kept, ctx.backend)
            if type(done) is tuple:
                dx, dgate = done
            elif ctx.back is None or asks_for_operators(dy):
                dx, dgate = by_step(done, operands, ctx.backend)
            else:
                p = LowRankGradient(*operands)._replace(dy=flatten(dy, "dy"))
                with outside_autocast(dy.device.type):  # which is the caller's, not the forward's
                    dx, dgate = run(in_panels(p, ctx.back), ctx.backend)
                dx = restore(dx, dy) if need_dx else None
        dbias = bias_gradient(dy) if need_dbias else None
        return dx, dbias, dgate, None, None, None, None, None


_record = eager.apply_of(KeptLowRankFunction)


def _made(
    p: LowRank, there: KeptOperands, backend: str | None, choice: Choice
) -> tuple[Tensor, Tensor]:
    """y [..., N] and h [M, r] for x [..., K]."""
    y, h = run(in_panels(p._replace(x=flatten(p.x)), there), backend, choice)
    if p.x.ndim == 2:
        return y, h
    # No view: one that is made within an autograd.Function may not be written in place.
    whole: Tensor = torch.ops.aten._unsafe_view(y, (*p.x.shape[:-1], y.shape[1]))
    return whole, h


def kept_low_rank(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate: Tensor,
    scaling: float,
    square: bool,
    kept: Callable[[bool], tuple[Kept, ...] | None],
) -> Tensor | None:
    """y [..., N] by what is kept; None where another recipe is ahead, or the call is odd.

    The operands are those of ``operands.LowRank``, of which x [..., K], weight and bias fit each
    other; ``square``: whether the gate is to be a core. ``kept(False)`` is what the forward reads,
    ``kept(True)`` the backward, or None.
    """
    if not _factors_fit(x, weight, up, down, gate, square):
        return None
    backend, p = pinned_backend(), LowRank(x, weight, bias, up, down, gate, None, float(scaling))
    forward = _operands(kept, False)
    if forward is None:
        return None
    made = eager.ask(forward_call, low_rank, (*p, forward), backend, gate.ndim)
    if isinstance(made, Tensor):
        return made
    if type(made) is tuple:
        back = _operands(kept, True)
        recorded: Tensor = _record(x, bias, gate, p, forward, back, backend, made)
        return recorded
    choice = choose(problem_of(p._replace(x=flatten(x)))._replace(layout="panels"), backend)
    if choice.recipe != PANELS:
        return None
    if not wants_gradient(x, bias, gate):
        return _made(p, forward, backend, choice)[0]
    args = (x, bias, gate, p, forward, _operands(kept, True), backend, choice)
    y: Tensor = KeptLowRankFunction.apply(*args)
    return y


def kept_kron(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    scaling: float,
    kept: Callable[[bool], tuple[Kept, ...] | None],
) -> Tensor | None:
    """y [..., N] by W in panels, likewise, of the operands of ``operands.Kron``."""

    def matrix(backward: bool) -> Kept | None:
        found = kept(backward)
        return None if found is None else found[0]

    operands = (x, weight, bias, a, b, a0, b0, float(scaling))
    return kron.at_once(pinned_backend(), *operands, kept=matrix)


def _operands(
    kept: Callable[[bool], tuple[Kept, ...] | None], backward: bool
) -> KeptOperands | None:
    found = kept(backward)
    return None if found is None else KeptOperands(*found)


def _factors_fit(
    x: Tensor, weight: Tensor, up: Tensor, down: Tensor, gate: Tensor, square: bool
) -> bool:
    """Whether they may be read as [N, r], [r, K] and [r] or [r, r]; others have their messages."""
    (n, k), r = weight.shape, gate.shape[-1] if gate.ndim else 0
    shapes = (n, r), (r, k), (r, r) if square else (r,)
    return gate.dtype in (x.dtype, accumulation_dtype(x.dtype)) and all(
        t.shape == shape and (t is gate or t.dtype == x.dtype) and t.device == x.device
        for t, shape in zip((up, down, gate), shapes, strict=True)
    )
