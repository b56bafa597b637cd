"""QR-LoRA and LoRA-XS as calls on the tensors themselves (see direct.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import chooser
from . import direct
from .common import flatten, restore
from .operator import Operator


class DirectLowRank(direct.DirectCall):
    """``qr_linear`` or ``lora_xs_linear``."""

    def __init__(self, bwd: Operator) -> None:
        super().__init__(bwd)
        self.core = direct.OPERATIONS.index(bwd.op) == 1  # the gate is C [r, r], not λ [r]

    def __call__(self, backend: str | None, *operands: Any) -> Tensor | None:
        """y, or None where the operation has to go its own way.

        ``operands`` are x, weight, bias, the two factors, the gate and the scaling, unchecked.
        """
        if not direct.is_open(backend):
            return None
        done = direct.CORE.low_rank_forward_call(self.core, *operands)
        if type(done) is tuple:
            return self._recorded(operands, done)
        if type(done) is not bool:
            y: Tensor | None = done
            return y
        return self._library_products(operands, record=done)

    def _library_products(self, operands: tuple[Any, ...], record: bool) -> Tensor:
        x, *rest, scaling = operands
        rows, rest = flatten(x), [*rest, float(scaling)]
        fwd = _library(f"{self.bwd.op}_fwd")
        if not record:
            return restore(fwd(rows, *rest)[0], x)
        with torch.no_grad():
            results = fwd(rows, *rest)
        # The view is taken of what was recorded: one made within may not be written in place.
        return restore(self._recorded((rows, *rest), results), x)

    def _recorded(self, operands: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> Tensor:
        x, weight, bias, first, second, gate, scaling = operands
        y: Tensor = _record(x, bias, gate, results, (weight, first, second), scaling, self)
        return y

    def gradients(self, dy: Tensor, *operands: Any) -> tuple[Tensor | None, Tensor | None]:
        """dx and the gate's gradient; ``operands`` are those of the backward, but for dy."""
        done = None
        if direct.is_open(None):
            done = direct.CORE.low_rank_backward_call(self.core, dy, *operands)
        if type(done) is tuple:
            return done
        rows, need_dx = flatten(dy), operands[-2]
        if done is None:
            dx, dgate = self.bwd(rows, *operands, None)
        else:
            dx, dgate = _library(f"{self.bwd.op}_bwd")(rows, *operands)
        return dx.view(*dy.shape[:-1], dx.shape[1]) if need_dx else None, dgate


def _library(step: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(chooser.load("composed"), step)
    return function


class _Record(torch.autograd.Function):
    """Autograd's record of a call that has run already; gradients for x, bias and the gate."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        gate: Tensor,
        results: tuple[Tensor, Tensor],
        frozen: tuple[Tensor, Tensor, Tensor],
        scaling: float,
        call: DirectLowRank,
    ) -> Tensor:
        y, h = results
        ctx.save_for_backward(*frozen, gate, h)
        ctx.call, ctx.scaling = call, float(scaling)
        return y

    @staticmethod
    @direct.backward
    def backward(ctx: Any, dy: Tensor) -> direct.Gradients:
        need_dx, need_dbias, need_dgate, *_ = ctx.needs_input_grad
        dx = dgate = None
        if need_dx or need_dgate:
            dx, dgate = ctx.call.gradients(dy, *ctx.saved_tensors, ctx.scaling, need_dx, need_dgate)
        dbias = flatten(dy).sum(0) if need_dbias else None
        return dx, dbias, dgate if need_dgate else None, None, None, None, None


_record = direct.apply_of(_Record)
