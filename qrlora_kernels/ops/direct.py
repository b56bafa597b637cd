"""The adapters in plain eager mode on the CPU: one native call on the tensors themselves.

Around a small layer the checks, the choice of the backend and the pointers cost more than its
arithmetic. The native core does all of that at once (csrc/direct), reading the tensors through
DLPack's C functions. It takes a call only where nothing can differ from what the operations do
otherwise: plain tensors that fit each other, no mode, no transform, no backend asked for. The
native kernels then run in the same call; where library products are preferred, their turn comes
without further questions. Every other call goes on as if this file were not there, with its checks
and messages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import native
from ..backends import chooser, measured
from ..backends.problem import Choice, Problem
from .operator import Operator

OPERATIONS = ("qr_linear", "lora_xs_linear", "kron_linear")  # as csrc/direct/choices.h lists them
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
    operation: str, step: str, x: Tensor, m: int, n: int, k: int, r: int
) -> tuple[Choice, bool] | None:
    """The chooser's answer, and whether all of that backend's step is the native call.

    What is not: for QR-LoRA and LoRA-XS everything, for OHoRA the base product. None for a backend
    that is neither native nor library products.
    """
    choice = chooser.choose_freely(Problem(operation, x.device, x.dtype, m, n, k, r))
    if operation == "kron_linear":
        if choice.name == "amx":
            return choice, True
        known = choice.name == "cpu" and x.dtype in (torch.float32, torch.float64)
        return (choice, measured.streams_base(step, m, n, k)) if known else None
    is_native = choice.name in ("cpu", "amx")
    return (choice, is_native) if is_native or choice.name == "composed" else None


def _connect() -> bool:
    """Hand torch's functions to the native core; False where calls on tensors cannot be served."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if CORE is None or capsule is None or None in _STATES:
        return False
    connected: bool = CORE.set_torch(
        capsule, Tensor, torch.nn.Parameter, _STATES, torch.is_grad_enabled,
        torch.get_num_threads, OPERATIONS, _choose, chooser._last,
    )  # fmt: skip
    return connected


CORE: Any = native.CORE
AVAILABLE = _connect()


def is_open(backend: str | None) -> bool:
    """Whether the native core may be asked at all; what is left it finds out itself."""
    return (
        AVAILABLE
        and not (backend or chooser._forced or torch.compiler.is_compiling())
        and forward_ad._current_level < 0
    )


class DirectCall:
    """An operation that the native core takes where it can.

    Parameters
    ----------
    bwd : Operator
        The operation's backward, for gradients that are not plain.
    """

    def __init__(self, bwd: Operator) -> None:
        self.bwd = bwd


Gradients = tuple[Tensor | None, ...]


def backward(
    gradients: Callable[[Any, Tensor], Gradients],
) -> Callable[[Any, Tensor], Gradients]:
    """A ``Function.backward`` that refuses a second derivative where one could be asked for."""
    guarded = once_differentiable(gradients)

    def run(ctx: Any, dy: Tensor) -> Gradients:
        # Without create_graph nothing is recorded here, and the wrapper has nothing to guard.
        result: Gradients = (guarded if torch.is_grad_enabled() else gradients)(ctx, dy)
        return result

    return run


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its questions about torch.func: the native call has asked them."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply
