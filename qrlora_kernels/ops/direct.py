"""QR-LoRA and LoRA-XS in plain eager mode on the CPU: one native call on the tensors themselves.

Around a small layer the checks, the choice of the backend and the pointers cost more than its
arithmetic. The native core does all of that at once (csrc/bindings/low_rank_call.cpp), reading the
tensors through DLPack's C functions. It takes a call only where nothing can differ from what the
operations do otherwise: plain tensors that fit each other, no mode, no transform, no backend asked
for. The native kernels then run in the same call; where the chooser prefers library products, their
turn comes without further questions. Every other call goes on as if this file were not there, with
its checks and messages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import native
from ..backends import chooser
from ..backends.problem import Choice, Problem
from .common import flatten, restore
from .operator import Operator

OPERATIONS = ("qr_linear", "lora_xs_linear")
# Each answers something false in plain eager mode; the native core asks them at each call. They are
# private: a torch without one of them does without this path.
_STATES: tuple[Callable[[], Any] | None, ...] = tuple(
    getattr(torch._C, name, None)
    for name in (
        "_is_any_autocast_enabled",
        "_are_functorch_transforms_active",
        "_len_torch_dispatch_stack",
        "_len_torch_function_stack",
        "_get_tracing_state",
    )
)


def _choose(
    operation: str, x: Tensor, m: int, n: int, k: int, r: int
) -> tuple[Choice, bool] | None:
    """The chooser's answer, and whether that backend's step is the native call.

    None for a backend that is neither that nor library products.
    """
    choice = chooser.choose(Problem(operation, x.device, x.dtype, m, n, k, r))
    is_native = choice.name in ("cpu", "amx")
    return (choice, is_native) if is_native or choice.name == "composed" else None


def _connect() -> bool:
    """Hand torch's functions to the native core; False where calls on tensors cannot be served."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if _core is None or capsule is None or None in _STATES:
        return False
    connected: bool = _core.set_torch(
        capsule, Tensor, torch.nn.Parameter, _STATES, torch.is_grad_enabled,
        torch.get_num_threads, OPERATIONS, _choose, chooser._last,
    )  # fmt: skip
    return connected


_core: Any = native.CORE
AVAILABLE = _connect()


def _is_open(backend: str | None) -> bool:
    """Whether the native core may be asked at all; what is left it finds out itself."""
    return (
        AVAILABLE
        and not torch.compiler.is_compiling()
        and chooser.pinned_backend(backend) is None
        and forward_ad._current_level < 0
    )


class DirectCall:
    """One of the two operations, taken by the native core where it can be.

    Parameters
    ----------
    bwd : Operator
        The operation's backward, for gradients that are not plain.
    """

    def __init__(self, bwd: Operator) -> None:
        self.bwd = bwd
        self.core = OPERATIONS.index(bwd.op) == 1  # the gate is C [r, r], not λ [r]

    def __call__(self, backend: str | None, *operands: Any) -> Tensor | None:
        """y, or None where the operation has to go its own way.

        ``operands`` are x, weight, bias, the two factors, the gate and the scaling, unchecked.
        """
        if not _is_open(backend):
            return None
        done = _core.low_rank_forward_call(self.core, *operands)
        if type(done) is tuple:
            return self._recorded(operands, done)
        if type(done) is not bool:
            y: Tensor | None = done
            return y
        return self._library_products(operands, record=done)

    def _library_products(self, operands: tuple[Any, ...], record: bool) -> Tensor:
        x, *rest = operands
        rows = flatten(x)
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
        if _is_open(None):
            done = _core.low_rank_backward_call(self.core, dy, *operands)
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
        call: DirectCall,
    ) -> Tensor:
        y, h = results
        ctx.save_for_backward(*frozen, gate, h)
        ctx.call, ctx.scaling = call, scaling
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Without create_graph nothing is recorded here, and the wrapper has nothing to guard.
        return (_guarded_backward if torch.is_grad_enabled() else _backward)(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need_dx, need_dbias, need_dgate, *_ = ctx.needs_input_grad
    dx = dgate = None
    if need_dx or need_dgate:
        dx, dgate = ctx.call.gradients(dy, *ctx.saved_tensors, ctx.scaling, need_dx, need_dgate)
    dbias = flatten(dy).sum(0) if need_dbias else None
    return dx, dbias, dgate if need_dgate else None, None, None, None, None


_guarded_backward = once_differentiable(_backward)
# ``Function.apply`` without its questions about torch.func, which the native call has asked.
_record = super(torch.autograd.Function, _Record).apply
