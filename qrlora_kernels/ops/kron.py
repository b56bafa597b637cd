"""OHoRA: y = x Wᵀ + b + s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x, saving only x for backward."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..autocast import autocast, outside_autocast
from ..dispatch.chooser import load, pinned_backend, run
from ..dispatch.problem import Choice
from ..operands import Kept, Kron, KronGradient, kron, kron_gradient
from ..reference import kron_ref
from . import eager, flops
from .checks import (
    asks_for_operators,
    autograd_reason,
    bias_gradient,
    by_autograd,
    check_linear,
    check_memory,
    check_operand,
    check_scaling,
    check_tensor,
    flatten,
    refuse_change,
    restore,
    wants_gradient,
)
from .operator import Operator, placeholder, y_without_data


def _bwd_fake(p: KronGradient) -> tuple[Tensor, Tensor, Tensor]:
    return (
        p.x.new_empty(p.x.shape) if p.need_dx else placeholder(p.dy),
        p.a.new_empty(p.a.shape) if p.need_da else placeholder(p.dy),
        p.b.new_empty(p.b.shape) if p.need_db else placeholder(p.dy),
    )


kron_fwd = Operator(
    "kron_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor? a0, Tensor? b0, "
    "float scaling, str? backend) -> Tensor",
    Kron,
    y_without_data,
    flops.kron_fwd,
)
kron_bwd = Operator(
    "kron_bwd",
    "(Tensor dy, Tensor x, Tensor weight, Tensor a, Tensor b, Tensor? a0, Tensor? b0, "
    "float scaling, bool need_dx, bool need_da, bool need_db, str? backend) "
    "-> (Tensor, Tensor, Tensor)",
    KronGradient,
    _bwd_fake,
    flops.kron_bwd,
)
# The native calls, of a core that need not be there.
_forward, _backward = attrgetter("kron_forward_call"), attrgetter("kron_backward_call")


# What a native call has made: y, and who adds the base product to it if that is missing; and W and
# Wᵀ in panels, where the layer keeps them.
Made = tuple[Tensor, Choice | None, Kept | None, Kept | None]


class KronFunction(torch.autograd.Function):
    """Autograd of the operation on x [M, K]; gradients for x, bias, a and b only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        a0: Tensor | None,
        b0: Tensor | None,
        scaling: float,
        backend: str | None,
        made: Made | None,
    ) -> Tensor:
        """``made``: None where the operator does both."""
        # The rows, whichever way the call goes: a checkpoint may go either way twice.
        rows = flatten(x)
        ctx.save_for_backward(rows, weight, a, b, a0, b0)
        ctx.scaling, ctx.backend, ctx.back = scaling, backend, None
        ctx.forms = (
            (rows.shape, rows.dtype), (weight.shape, weight.dtype),
            (a.shape, a.dtype), (b.shape, b.dtype),
            None if a0 is None else (a0.shape, a0.dtype),
            None if b0 is None else (b0.shape, b0.dtype),
        )  # fmt: skip
        if made is None:
            y: Tensor = kron_fwd(x, weight, bias, a, b, a0, b0, scaling, backend)
            return y
        y, base, there, ctx.back = made
        return y if base is None else _with_base(base, y, x, weight, bias, there)

    @staticmethod
    @eager.backward
    def backward(ctx: Any, dy: Tensor) -> eager.Gradients:
        need_dx, _, need_dbias, *needed = ctx.needs_input_grad[:5]
        dx = da = db = None
        if need_dx or any(needed):
            saved = ctx.saved_tensors  # once: a checkpoint unpacks them no second time
            x, weight, a, b, a0, b0 = saved
            if ctx.forms != (
                (x.shape, x.dtype), (weight.shape, weight.dtype),
                (a.shape, a.dtype), (b.shape, b.dtype),
                None if a0 is None else (a0.shape, a0.dtype),
                None if b0 is None else (b0.shape, b0.dtype),
            ):  # fmt: skip
                refuse_change(ctx.forms, x=x, weight=weight, a=a, b=b, a0=a0, b0=b0)
            operands = (*saved, ctx.scaling, need_dx, *needed)
            dx, da, db = _gradients(dy, operands, ctx.back, ctx.backend)
        dbias = bias_gradient(dy) if need_dbias else None
        return dx, None, dbias, da, db, None, None, None, None, None


_record = eager.apply_of(KronFunction)


def _gradients(
    dy: Tensor, operands: tuple[Any, ...], kept: Kept | None, backend: str | None
) -> eager.Gradients:
    """dx [..., K], da and db; ``operands`` are those of the backward, but for dy [..., N]."""
    done = eager.ask(_backward, kron_gradient, (dy, *operands, kept), backend)
    if done is None:
        rows = flatten(dy, "dy")
        if kept is None or asks_for_operators(dy):
            found = kron_bwd(rows, *operands, backend)
        else:
            with outside_autocast(dy.device.type):  # which is the caller's, not the forward's
                found = run(kron_gradient(rows, *operands, kept), backend)
        dx, *rest = (t if need else None for t, need in zip(found, operands[-3:], strict=True))
        return None if dx is None else restore(dx, dy), *rest
    dx, da, db, base = done
    if dx is not None and base is not None:
        dx = _with_base(base, dx, dy, operands[1].mT, None, kept)
    return dx, da, db


def _with_base(
    choice: Choice,
    update: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: Kept | None,
) -> Tensor:
    """x Wᵀ + b onto the ``update`` [..., N] of a native call, in its place or in a new tensor."""
    rows = flatten(update)
    whole = load(choice.backend).add_base(choice.recipe, rows, flatten(x), weight, bias, kept)
    # No view: one that is made within an autograd.Function may not be written in place.
    return update if whole is rows else torch.ops.aten._unsafe_view(whole, update.shape)


def at_once(
    backend: str | None,
    *operands: Any,
    kept: Callable[[bool], Kept | None] | None = None,
) -> Tensor | None:
    """y by the one native call, or None where the operation has to go its own way.

    ``operands`` are those of ``Kron``, unchecked, with x [..., K]. ``kept(False)`` is W in panels,
    ``kept(True)`` Wᵀ, or None.
    """
    there = None if kept is None else kept(False)
    done = eager.ask(_forward, kron, (*operands, there), backend)
    if done is None:
        return None
    y: Tensor
    y, base, record = done
    x, weight, bias, *_, scaling = operands
    if record:
        made = (y, base, there, None if kept is None else kept(True))
        y = _record(*operands[:-1], float(scaling), None, made)
    elif base is not None:
        y = _with_base(base, y, x, weight, bias, there)
    return y


def call(backend: str | None, *operands: Any) -> Tensor:
    """y with the checks and their messages; ``operands`` as :func:`at_once` takes them."""
    p = _checked(Kron(*operands))
    trains = (p.x, p.bias, p.a, p.b)
    if reason := autograd_reason((p.weight, p.a0, p.b0), trains):
        return by_autograd("kron_linear", reason, backend, kron_ref, p)
    x, *rest, scaling = p
    flat = (flatten(x), *rest, float(scaling))
    if wants_gradient(*trains):
        y: Tensor = KronFunction.apply(*flat, pinned_backend(backend), None)
    else:
        y = kron_fwd(*flat, backend)
    return restore(y, x)


def _checked(p: Kron) -> Kron:
    """The operands in their final dtypes."""
    x, weight, bias, a, b, a0, b0, scaling = p
    check_scaling(scaling)
    check_memory(x=x, weight=weight, bias=bias, a=a, b=b, a0=a0, b0=b0)
    x, weight, bias = autocast(x, weight, bias)
    check_linear(x, weight, bias)
    p = Kron(x, weight, bias, a, b, a0, b0, scaling)
    _check_factors(p)
    return p


def _check_factors(p: Kron) -> None:
    (n, k), a, b, a0, b0 = p.weight.shape, p.a, p.b, p.a0, p.b0
    check_tensor("a", a)
    rank = a.shape[1] if a.dim() == 2 else 0
    if rank == 0 or n % rank or k % rank:
        raise ValueError(
            f"a must have shape [N/r, r] with r dividing N={n} and K={k}, got {list(a.shape)}"
        )
    if (a0 is None) != (b0 is None):
        raise ValueError("a0 and b0 must be given together, got only one of them")
    factors: dict[str, tuple[Tensor, tuple[int, int]]] = {
        "a": (a, (n // rank, rank)),
        "b": (b, (k // rank, rank)),
    }
    if a0 is not None and b0 is not None:
        factors["a0"], factors["b0"] = (a0, factors["a"][1]), (b0, factors["b"][1])
    for name, (factor, shape) in factors.items():
        check_operand(name, factor, shape, p.x, or_fp32=True)
        if factor.dtype != a.dtype:
            raise TypeError(f"{name} must have the dtype of a, {a.dtype}, got {factor.dtype}")
