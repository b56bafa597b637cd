"""OHoRA as a call on the tensors themselves (see direct.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import chooser
from . import direct
from .common import bias_gradient, flatten


class DirectKron(direct.DirectCall):
    """``kron_linear``."""

    def __call__(self, backend: str | None, *operands: Any) -> Tensor | None:
        """y, or None where the operation has to go its own way.

        ``operands`` are x, weight, bias, a, b, a0, b0 and the scaling, unchecked.
        """
        done = direct.CORE.kron_forward_call(*operands) if direct.is_open(backend) else None
        if done is None:
            return None
        y: Tensor
        y, whole, record = done
        x, weight, bias, a, b, a0, b0, scaling = operands
        if record:
            y = _record(x, bias, a, b, done, (weight, a0, b0), scaling, self)
        elif not whole:
            _add_base(y, x, weight, bias)
        return y

    def gradients(
        self, dy: Tensor, *operands: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dx, da and db; ``operands`` are those of the backward, but for dy [..., N]."""
        done = direct.CORE.kron_backward_call(dy, *operands) if direct.is_open(None) else None
        weight, needed = operands[1], operands[-3:]
        if done is None:
            found = self.bwd(flatten(dy, "dy"), *operands, None)
            dx, da, db = (t if need else None for t, need in zip(found, needed, strict=True))
            return None if dx is None else dx.view(*dy.shape[:-1], dx.shape[1]), da, db
        dx, da, db, whole = done
        if dx is not None and not whole:
            _add_base(dx, dy, weight.mT, None)
        return dx, da, db


def _add_base(update: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """x Wᵀ + b onto ``update`` (fp32 or fp64), in place."""
    chooser.load("composed").add_base(flatten(update), flatten(x), weight, bias)


class _Record(torch.autograd.Function):
    """Autograd's record of a call that has run already; gradients for x, bias, a and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        done: tuple[Tensor, bool, bool],
        frozen: tuple[Tensor, Tensor | None, Tensor | None],
        scaling: float,
        call: DirectKron,
    ) -> Tensor:
        (y, whole, _), (weight, a0, b0) = done, frozen
        # The rows, as KronLinearFunction saves them: a checkpoint may go either way twice.
        ctx.save_for_backward(flatten(x), weight, a, b, a0, b0)
        ctx.call, ctx.scaling = call, float(scaling)
        if not whole:
            _add_base(y, x, weight, bias)
        return y

    @staticmethod
    @direct.backward
    def backward(ctx: Any, dy: Tensor) -> direct.Gradients:
        need_dx, need_dbias, *need_factors = ctx.needs_input_grad[:4]
        dx = da = db = None
        if need_dx or any(need_factors):
            dx, da, db = ctx.call.gradients(
                dy, *ctx.saved_tensors, ctx.scaling, need_dx, *need_factors
            )
        dbias = bias_gradient(dy) if need_dbias else None
        return dx, dbias, da, db, None, None, None, None


_record = direct.apply_of(_Record)
