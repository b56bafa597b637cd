"""QR-LoRA and LoRA-XS in plain eager mode on the CPU: one native call on the tensors themselves.

Around a small layer the checks, the choice of the backend and the pointers cost more than its
arithmetic. The native core does all of that at once (csrc/bindings/low_rank_call.cpp), reading the
tensors through DLPack's C functions. It takes a call only where nothing can differ from what the
operations do otherwise: plain tensors that fit each other, no mode, no transform, no backend asked
for, and a problem that the chooser gives to the native kernels. Every other call goes on as if this
file were not there, with its checks and messages.
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
from .common import flatten

OPERATIONS = ("qr_linear", "lora_xs_linear")
# Each answers something false in plain eager mode; the native core asks them at each call.
_STATES: tuple[Callable[[], Any], ...] = (
    torch._C._is_any_autocast_enabled,
    torch._C._are_functorch_transforms_active,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._get_tracing_state,
)


def _choose(operation: str, x: Tensor, m: int, n: int, k: int, r: int) -> Choice | None:
    """The chooser's answer, where it is a backend whose step is the native low-rank call."""
    choice = chooser.choose(Problem(operation, x.device, x.dtype, m, n, k, r))
    return choice if choice.name in ("cpu", "amx") else None


def _connect() -> bool:
    """Hand torch's functions to the native core; False where calls on tensors cannot be served."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if native.CORE is None or capsule is None:
        return False
    return bool(
        native.CORE.set_torch(
            capsule, Tensor, torch.nn.Parameter, _STATES, torch.is_grad_enabled,
            torch.get_num_threads, OPERATIONS, _choose, chooser._last,
        )
    )  # fmt: skip


AVAILABLE = _connect()


def low_rank(
    core: bool, bwd: Callable[..., Any], backend: str | None, *operands: Any
) -> Tensor | None:
    """y, or None where the operation has to go its own way.

    Parameters
    ----------
    core : bool
        Whether the gate is LoRA-XS's core [r, r]; otherwise QR-LoRA's λ [r].
    bwd : callable
        The operation's backward, for gradients that are not plain.
    backend : str or None
        The argument of the public function.
    *operands
        x, weight, bias, the two factors, the gate and the scaling, unchecked.
    """
    if not AVAILABLE or torch.compiler.is_compiling() or not _unforced(backend):
        return None
    done = native.CORE.low_rank_forward_call(core, *operands)
    if type(done) is not tuple:
        return done
    x, weight, bias, first, second, gate, scaling = operands
    return _record(x, bias, gate, done, (weight, first, second), core, scaling, bwd)


def _unforced(backend: str | None) -> bool:
    return chooser.pinned_backend(backend) is None and forward_ad._current_level < 0


class _Record(torch.autograd.Function):
    """Autograd's record of a call that has run already; gradients for x, bias and the gate."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        gate: Tensor,
        done: tuple[Tensor, Tensor],
        frozen: tuple[Tensor, Tensor, Tensor],
        core: bool,
        scaling: float,
        bwd: Callable[..., Any],
    ) -> Tensor:
        y, h = done
        ctx.save_for_backward(*frozen, gate, h)
        ctx.call = core, scaling, bwd
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Without create_graph nothing is recorded here, and the wrapper has nothing to guard.
        return (_guarded_backward if torch.is_grad_enabled() else _backward)(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    core, scaling, bwd = ctx.call
    need_dx, need_dbias, need_dgate = ctx.needs_input_grad[:3]
    dx = dgate = None
    if need_dx or need_dgate:
        operands = (*ctx.saved_tensors, scaling, need_dx, need_dgate)
        done = None
        if not torch.compiler.is_compiling() and _unforced(None):
            done = native.CORE.low_rank_backward_call(core, dy, *operands)
        if done is None:
            dx, dgate = bwd(flatten(dy), *operands, None)
            dx = dx.view(*dy.shape[:-1], dx.shape[1]) if need_dx else None
        else:
            dx, dgate = done
    return (
        dx,
        flatten(dy).sum(0) if need_dbias else None,
        dgate if need_dgate else None,
        None, None, None, None, None,
    )  # fmt: skip


_guarded_backward = once_differentiable(_backward)
# ``Function.apply`` without its questions about torch.func, which the native call has asked.
_record = super(torch.autograd.Function, _Record).apply
