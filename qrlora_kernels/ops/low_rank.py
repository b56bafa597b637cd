"""Low rank over a frozen layer, y = x Wᵀ + b + s · gate(h) upᵀ, saving h [M, r] for backward.

A recipe whose forward has made W + ΔW may have it saved too, where it is small (rule 8).

QR-LoRA and LoRA-XS are this operation with another gate; ``operands.LowRank`` has the shapes.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autocast import autocast
from ..dispatch.chooser import perform, pinned_backend, run
from ..dispatch.problem import Choice
from ..operands import LowRank, LowRankGradient, low_rank, low_rank_gradient
from ..reference import hidden_dtype, low_rank_ref
from . import eager, flops
from .checks import (
    autograd_reason,
    bias_gradient,
    by_autograd,
    check_linear,
    check_memory,
    check_operand,
    check_range,
    check_scaling,
    check_tensor,
    flatten,
    refuse_change,
    restore,
    wants_gradient,
)
from .operator import Operator, Unanswered, placeholder, y_without_data


class Public(NamedTuple):
    """A public function, and what it calls the operands."""

    name: str
    up: str
    down: str
    gate: str
    mixed: bool = False
    dims: tuple[int, ...] = (1,)  # that its gate may have
    output_form: bool = False  # whether down may be None


QR_LINEAR = Public("qr_linear", "q", "r", "lam", output_form=True)
LORA_XS_LINEAR = Public("lora_xs_linear", "b", "a", "core", dims=(2,))
MIXED_LOW_RANK_LINEAR = Public("mixed_low_rank_linear", "b", "a", "gates", True, (2, 3), True)


# --- the operators ------------------------------------------------------------------------------


def _fwd_fake(p: LowRank) -> tuple[Tensor, Tensor]:
    h = p.x.new_empty(p.x.shape[0], p.gate.shape[-1], dtype=hidden_dtype(p.x.dtype))
    return y_without_data(p), h


def _bwd_fake(p: LowRankGradient) -> tuple[Tensor, Tensor]:
    dx = p.dy.new_empty(p.dy.shape[0], p.weight.shape[1]) if p.need_dx else placeholder(p.dy)
    return dx, p.gate.new_empty(p.gate.shape) if p.need_dgate else placeholder(p.dy)


low_rank_fwd = Operator(
    "low_rank_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor up, Tensor? down, Tensor gate, Tensor? index, "
    "float scaling, str? backend) -> (Tensor, Tensor)",
    LowRank,
    _fwd_fake,
    flops.low_rank_fwd,
)
low_rank_bwd = Operator(
    "low_rank_bwd",
    "(Tensor dy, Tensor weight, Tensor up, Tensor? down, Tensor gate, Tensor? index, Tensor h, "
    "float scaling, bool need_dx, bool need_dgate, str? backend) -> (Tensor, Tensor)",
    LowRankGradient,
    _bwd_fake,
    flops.low_rank_bwd,
)


# The native calls, of a core that need not be there.
forward_call = attrgetter("low_rank_forward_call")
backward_call = attrgetter("low_rank_backward_call")


# --- autograd -----------------------------------------------------------------------------------


class LowRankFunction(torch.autograd.Function):
    """Autograd of the operation on x [M, K]; gradients for x, bias and the gate only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor | None,
        gate: Tensor,
        index: Tensor | None,
        scaling: float,
        backend: str | None,
        made: tuple[Tensor, Tensor] | Choice | None,
    ) -> Tensor:
        """``made``: y and h where a native call has made them, or who is to make them of what the
        native core has checked; None where the operator does both."""
        operands = (x, weight, bias, up, down, gate, index, scaling)
        handed_on: list[Tensor] = []  # W + ΔW
        if made is None:
            y, h = low_rank_fwd(*operands, backend)
        elif type(made) is Choice:
            y, h, *handed_on = perform(made, "low_rank_fwd", LowRank(*operands))
        else:
            y, h = made  # type: ignore[misc]
        if not ctx.needs_input_grad[0]:
            handed_on = []  # it is for dx
        ctx.save_for_backward(weight, up, down, gate, index, h, *handed_on)
        ctx.scaling, ctx.backend, ctx.made = scaling, backend, made if handed_on else None
        ctx.forms = (
            (weight.shape, weight.dtype), (up.shape, up.dtype),
            None if down is None else (down.shape, down.dtype), (gate.shape, gate.dtype),
        )  # fmt: skip
        return y

    @staticmethod
    @eager.backward
    def backward(ctx: Any, dy: Tensor) -> eager.Gradients:
        need_dx, _, need_dbias, _, _, need_dgate, *_ = ctx.needs_input_grad
        dx = dgate = None
        if need_dx or need_dgate:
            weight, up, down, gate, index, h, *handed_on = ctx.saved_tensors
            if ctx.forms != (
                (weight.shape, weight.dtype), (up.shape, up.dtype),
                None if down is None else (down.shape, down.dtype), (gate.shape, gate.dtype),
            ):  # fmt: skip
                refuse_change(ctx.forms, weight=weight, up=up, down=down, gate=gate)
            frozen = (weight, up, down, gate, index, h)
            operands = (dy, *frozen, ctx.scaling, need_dx, need_dgate)
            done = eager.ask(backward_call, low_rank_gradient, (*operands, None), ctx.backend)
            if type(done) is list and need_dx and handed_on:
                done = [ctx.made, *handed_on]
            dx, dgate = done if type(done) is tuple else by_step(done, operands, ctx.backend)
        dbias = bias_gradient(dy) if need_dbias else None
        return dx, None, dbias, None, None, dgate, None, None, None, None


_record = eager.apply_of(LowRankFunction)


def by_step(
    done: list[Any] | None, operands: tuple[Any, ...], backend: str | None
) -> tuple[Tensor | None, Tensor | None]:
    """dx [..., K] and the gate's gradient; ``done``: who makes them of what the native core has
    checked, and W + ΔW where the forward hands it on, or None where the operator does both."""
    dy, *rest = operands
    rows = flatten(dy, "dy")
    if done is None:
        dx, dgate = low_rank_bwd(rows, *rest, backend)
    else:
        choice, *handed_on = done
        p = LowRankGradient(rows, *rest)
        if handed_on:
            dx, dgate = run(p._replace(weight=handed_on[0]), backend, choice)
        else:
            dx, dgate = perform(choice, "low_rank_bwd", p)
    need_dx, need_dgate = rest[-2:]
    return restore(dx, dy) if need_dx else None, dgate if need_dgate else None


# --- the calls ----------------------------------------------------------------------------------


def at_once(public: Public, backend: str | None, *operands: Any) -> Tensor | None:
    """y by the one native call, or None where the operation has to go its own way.

    ``operands`` are those of ``LowRank``, unchecked, with x [..., K].
    """
    dim = 0 if public.mixed else public.dims[0]  # of a gate without an index
    done = eager.ask(forward_call, low_rank, (*operands, None), backend, dim)
    if type(done) is not tuple and type(done) is not list:
        return done  # y, or None
    if public.mixed:  # by row of the flat x, as backends and backwards have it
        *rest, index, scaling = operands
        operands = (*rest, index.reshape(-1), scaling)
    y: Tensor = (
        _by_library(done, operands) if type(done) is list else _record(*operands, None, done)
    )
    return y


def _by_library(done: list[Any], operands: tuple[Any, ...]) -> Tensor:
    """Library products, on operands that the native core has checked."""
    choice, record = done
    x, *rest, scaling = operands
    operands = (flatten(x), *rest, float(scaling))
    if record:
        y = _record(*operands, None, choice)
    else:
        y, *_ = perform(choice, "low_rank_fwd", LowRank(*operands))
    # The view is taken of what was recorded: one made within may not be written in place.
    return restore(y, x)


def call(public: Public, backend: str | None, *operands: Any) -> Tensor:
    """y with the checks and their messages; ``operands`` as :func:`at_once` takes them."""
    checked = _checked(public, LowRank(*operands))
    x, weight, bias, up, down, gate, index, scaling = checked
    trains = (x, bias, gate)
    if reason := autograd_reason((weight, up, down), trains):
        if index is not None and _has_values(index):
            check_range(index, gate.shape[0])
        return by_autograd(public.name, reason, backend, low_rank_ref, LowRank(*checked))
    index = None if index is None else index.reshape(-1)
    flat = (flatten(x), weight, bias, up, down, gate, index, float(scaling))
    try:
        if wants_gradient(*trains):
            y: Tensor = LowRankFunction.apply(*flat, pinned_backend(backend), None)
        else:
            y, _ = low_rank_fwd(*flat, backend)
    except Unanswered as error:
        name = {"up": public.up, "down": public.down, "gate": public.gate}.get(error.name)
        if name is None:
            raise
        raise Unanswered(name, error.operator, error.operand) from error
    return restore(y, x)


def _checked(public: Public, p: LowRank) -> tuple[Any, ...]:
    """The operands in their final dtypes, with an index, if any, of x's leading dimensions."""
    x, weight, bias, up, down, gate, index, scaling = p
    check_scaling(scaling)
    named = {public.up: up, public.down: down, public.gate: gate}
    check_memory(x=x, weight=weight, bias=bias, **named)
    if public.mixed:
        check_memory(index=index)
    x, weight, bias, up, down = autocast(x, weight, bias, up, down)
    check_linear(x, weight, bias)
    rank = _check_gate(public, gate, x)
    _check_factors(public, up, down, rank, x, weight)
    if public.mixed:
        index = _checked_index(index, x)
        if gate.shape[0] == 1 and _has_values(index):  # one adapter: every row's
            check_range(index, 1)
            gate, index = gate[0], None
    return x, weight, bias, up, down, gate, index, scaling


def _check_gate(public: Public, gate: Tensor, x: Tensor) -> int:
    """The rank."""
    check_tensor(public.gate, gate)
    rank = gate.shape[-1] if gate.ndim in public.dims else 0
    shape = (rank,) * public.dims[0]
    if public.mixed:
        shape = tuple(gate.shape)
        square = gate.ndim < 3 or gate.shape[1] == rank
        if gate.ndim not in public.dims or not shape[0] or not square:
            raise ValueError(
                f"{public.gate} must have shape [A, r] or [A, r, r] with A of at least 1, got "
                f"{list(shape)}"
            )
    check_operand(public.gate, gate, shape, x, or_fp32=True)
    return rank


def _check_factors(
    public: Public, up: Tensor, down: Tensor | None, rank: int, x: Tensor, weight: Tensor
) -> None:
    """up [N, w] and, of two sides, down [w, K], of one width w ≥ rank."""
    check_tensor(public.up, up)
    width = up.shape[1] if up.ndim == 2 and up.shape[1] > rank else rank
    if down is None and public.output_form:
        check_operand(public.up, up, (weight.shape[0], width), x)
        return
    check_tensor(public.down, down)
    assert down is not None
    if down.ndim != 2 or down.shape[0] != width:
        width = rank
    check_operand(public.up, up, (weight.shape[0], width), x)
    check_operand(public.down, down, (width, weight.shape[1]), x)


def _checked_index(index: Tensor | None, x: Tensor) -> Tensor:
    check_tensor("index", index)
    assert index is not None
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"index must be of an integer dtype, got {index.dtype}")
    if index.device != x.device:
        raise ValueError(f"index must be on {x.device} like x, got {index.device}")
    lead = x.shape[:-1]
    if index.shape != lead and list(index.shape) != [lead.numel()]:
        raise ValueError(
            f"index must have shape {list(lead)} like x, or [{lead.numel()}], got "
            f"{list(index.shape)}"
        )
    return index.to(torch.int64).reshape(lead)


def _has_values(index: Tensor) -> bool:
    """Whether the numbers may be looked at now; a trace is of any numbers, and of any A."""
    return not (
        torch.compiler.is_compiling()
        or index.is_meta
        or type(index) is not Tensor
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )
