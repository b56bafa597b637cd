"""The one native call: the adapters in plain eager mode on the CPU, on the tensors themselves.

Around a small layer the checks, the choice of the backend and the pointers cost more than its
arithmetic. The native core does all of that at once (csrc/python), reading the tensors through
DLPack's C functions. It takes a call only where nothing can differ from what the operations do
otherwise: plain tensors that fit each other, no mode, no transform, no backend asked for. It runs
what it was told to for such a problem, and where it was told nothing yet, says so. Every other call
goes on as if this file were not there, with its checks and messages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import native
from ..dispatch import chooser
from ..dispatch.problem import ELSEWHERE, GATES, Choice, Problem, problem_of
from ..native import DTYPES
from ..operands import Operands
from .checks import flatten

OPERATIONS = ("low_rank", "kron")  # as csrc/python/plans.h lists them
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


def _connect() -> bool:
    """Hand torch's functions to the native core; False where calls on tensors cannot be served."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if CORE is None or capsule is None or None in _STATES:
        return False
    connected: bool = CORE.set_torch(
        capsule, Tensor, torch.nn.Parameter, _STATES, torch.is_grad_enabled,
        torch.get_num_threads, chooser._last,
    )  # fmt: skip
    return connected


CORE: Any = native.CORE
AVAILABLE = _connect()


def ask(
    call_of: Callable[[Any], Any],
    record: Callable[..., Operands],
    operands: tuple[Any, ...],
    backend: str | None,
    *leading: int,
) -> Any:
    """What a native call answers of ``leading`` and the unchecked operands of ``record``.

    None where the operation has to go its own way: the core may not be asked, or refuses.
    """
    if not AVAILABLE or backend or chooser._forced or torch.compiler.is_compiling():
        return None
    if forward_ad._current_level >= 0:
        return None
    call = call_of(CORE)
    done = call(*leading, *operands)
    if done is NotImplemented:
        _tell(record, operands)
        done = call(*leading, *operands)
    return None if done is NotImplemented else done  # another thread had it forgotten


def _tell(record: Callable[..., Operands], operands: tuple[Any, ...]) -> None:
    """Tell the core who runs the step on these operands, which fit each other."""
    rows, *rest = operands
    problem = problem_of(record(flatten(rows), *rest))
    choice = chooser.choose_freely(problem)
    CORE.tell(_key(problem), _code(problem, choice), (problem.public_name, problem.step), choice)


def _code(problem: Problem, choice: Choice) -> int:
    known = chooser.recipes(choice.backend, problem)
    return next((recipe.code for recipe in known if recipe.name == choice.recipe), ELSEWHERE)


_LAYOUTS = {"columns": 1, "panels": 2}


def _key(p: Problem) -> tuple[int, ...]:
    """The problem as the core finds it out for itself."""
    return (
        OPERATIONS.index(p.op), int(p.step == "bwd"), DTYPES[p.dtype], p.m, p.n, p.k, p.r,
        GATES.index(p.gate) if p.gate else 0, _LAYOUTS.get(p.layout, 0),
        sum(need << i for i, need in enumerate(p.needs)), int(p.bias),
    )  # fmt: skip


Gradients = tuple[Tensor | None, ...]


def backward(
    gradients: Callable[[Any, Tensor], Gradients],
) -> Callable[[Any, Tensor], Gradients]:
    """A ``Function.backward`` that refuses a second derivative where one could be asked for."""
    guarded = once_differentiable(gradients)

    def run(ctx: Any, dy: Tensor) -> Gradients:
        if forward_ad._current_level >= 0:
            _refuse_tangent(dy)
        # Without create_graph nothing is recorded here, and the wrapper has nothing to guard.
        result: Gradients = (guarded if torch.is_grad_enabled() else gradients)(ctx, dy)
        return result

    return run


def _refuse_tangent(dy: Tensor) -> None:
    if forward_ad.unpack_dual(dy).tangent is not None:
        raise RuntimeError(
            "dy must have no tangent, got one: the backward of an adapter has no forward-mode "
            "derivative where its forward ran outside of the dual level"
        )


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its questions about torch.func: the native call has asked them."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply
