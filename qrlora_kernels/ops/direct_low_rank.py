"""QR-LoRA and LoRA-XS as calls on the tensors themselves (see direct.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import chooser
from . import direct
from .common import bias_gradient, flatten, restore
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
        operands = (flatten(x), *rest, float(scaling))
        # The view is taken of what was recorded: one made within may not be written in place.
        y = self._recorded(operands, None) if record else self.products("fwd")(*operands)[0]
        return restore(y, x)

    def _recorded(self, operands: tuple[Any, ...], results: tuple[Tensor, Tensor] | None) -> Tensor:
        x, weight, bias, first, second, gate, scaling = operands
        y: Tensor = _record(x, bias, gate, results, (weight, first, second), scaling, self)
        return y

    def products(self, step: str) -> Callable[..., Any]:
        """The composition of library products, on x or dy with two dimensions."""
        function: Callable[..., Any] = getattr(chooser.load("composed"), f"{self.bwd.op}_{step}")
        return function

    def gradients(self, dy: Tensor, *operands: Any) -> tuple[Tensor | None, Tensor | None]:
        """dx and the gate's gradient; ``operands`` are those of the backward, but for dy."""
        done = None
        if direct.is_open(None):
            done = direct.CORE.low_rank_backward_call(self.core, dy, *operands)
        if type(done) is tuple:
            return done
        need_dx = operands[-2]
        rows = flatten(dy, "dy")
        if done is None:
            dx, dgate = self.bwd(rows, *operands, None)
        else:
            dx, dgate = self.products("bwd")(rows, *operands)
        return restore(dx, dy) if need_dx else None, dgate


class _Record(torch.autograd.Function):
    """Autograd's record of a call; gradients for x, bias and the gate.

    The call has run already, or is the library's: its products run here, where none of them is
    recorded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        gate: Tensor,
        results: tuple[Tensor, Tensor] | None,
        frozen: tuple[Tensor, Tensor, Tensor],
        scaling: float,
        call: DirectLowRank,
    ) -> Tensor:
        weight, first, second = frozen
        y, h = results or call.products("fwd")(x, weight, bias, first, second, gate, scaling)
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
        dbias = bias_gradient(dy) if need_dbias else None
        return dx, dbias, dgate if need_dgate else None, None, None, None, None


_record = direct.apply_of(_Record)
