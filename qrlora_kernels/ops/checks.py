"""What the operations share: argument checks, and when autograd must see plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..autocast import outside_autocast
from ..dispatch.chooser import autograd_choice
from ..modes import seen_through
from ..native import pointers
from ..operands import Operands
from ..reference import HALF

FLOATING = (torch.float32, torch.float64, *HALF)


def flatten(x: Tensor, name: str = "x") -> Tensor:
    """[..., K] to [M, K]."""
    if x.ndim == 2:
        return x
    check_memory(**{name: x})  # which reshaping may read
    # The product, not -1: that is ambiguous where K = 0.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def restore(y: Tensor, x: Tensor) -> Tensor:
    """[M, N] to x's leading dimensions."""
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """x [..., K], weight [N, K], bias [N] or None, one floating dtype, one device."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        check_tensor("x", x)
        check_tensor("weight", weight)
    if x.dtype not in FLOATING:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape [N, K], got {tuple(weight.shape)}")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must have {weight.shape[1]} features in its last dimension (weight is "
            f"{tuple(weight.shape)}), got shape {tuple(x.shape)}"
        )
    check_operand("weight", weight, weight.shape, x)
    if bias is not None:
        check_operand("bias", bias, (weight.shape[0],), x)


def check_operand(
    name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor, or_fp32: bool = False
) -> None:
    """``tensor`` has ``shape`` and x's device and dtype (or fp32, for trainables over half)."""
    if not isinstance(tensor, Tensor):
        check_tensor(name, tensor)
    if tensor.shape == shape and tensor.dtype == x.dtype and tensor.device == x.device:
        return  # on the path of every call, where each question takes a fraction of a microsecond
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
    if not (or_fp32 and x.dtype in HALF and tensor.dtype == torch.float32):
        wider = " or torch.float32" if or_fp32 and x.dtype in HALF else ""
        expected = f"{x.dtype} like x{wider}"
        raise TypeError(f"{name} must be {expected}, got {tensor.dtype}")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_memory(**operands: Tensor | None) -> None:
    """Refuse a tensor whose elements are not there, before anything reads them.

    Wrappers answer for themselves, and so does the meta device, which reads nothing.
    """
    if torch.compiler.is_compiling() or pointers.are_plain(*operands.values()):
        return
    for name, t in operands.items():
        # What is no tensor is named by the checks, which come after.
        if isinstance(t, Tensor) and not (t.is_meta or pointers.is_wrapper(t)):
            pointers.checked(t, name)


def check_range(index: Tensor, adapters: int) -> None:
    """On the CPU an error that tells the value; on a GPU an assertion on the device, which waits
    for nothing."""
    if index.is_meta or not index.numel():
        return
    if index.is_cuda:
        inside = ((index >= 0) & (index < adapters)).all()
        torch._assert_async(inside, f"index must be from 0 to {adapters - 1}")
        return
    for value in (int(index.min()), int(index.max())):
        if not 0 <= value < adapters:
            raise ValueError(f"index must be from 0 to {adapters - 1}, got {value}")


def check_scaling(scaling: object) -> None:
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling must be a float, got {type(scaling).__name__}")


def bias_gradient(dy: Tensor) -> Tensor:
    """Σ dy over all tokens [N]."""
    check_memory(dy=dy)
    return flatten(dy, "dy").sum(0)


def wants_gradient(*operands: Tensor | None) -> bool:
    """Whether autograd must record the call at all."""
    return torch.is_grad_enabled() and asks_for_gradient(*operands)


def asks_for_gradient(*operands: Tensor | None) -> bool:
    """Whether an operand would have one, if gradients were on."""
    for t in operands:  # noqa: SIM110  # each call counts on the path of every call
        if t is not None and t.requires_grad:
            return True
    return False


Form = tuple[torch.Size, torch.dtype] | None  # of an operand that may be missing


def refuse_change(before: tuple[Form, ...], **now: Tensor | None) -> None:
    """Name what was resized or cast between the forward and this backward.

    ``tensor.data = other`` and ``model.half()``, which writes so, are not seen by PyTorch's count
    of writes; a kernel would read the new numbers as what was there. The caller compares, since
    each call of a backward counts.
    """
    for form, (name, t) in zip(before, now.items(), strict=True):
        found = None if t is None else (t.shape, t.dtype)
        if found == form:
            continue
        if found is None or form is None or found[0] != form[0]:
            raise RuntimeError(
                f"{name} must be of the forward's shape, {form and list(form[0])}, got "
                f"{found and list(found[0])}: it was resized before the backward"
            )
        raise RuntimeError(
            f"{name} must be of the forward's dtype, {form[1]}, got {found[1]}: it was cast before "
            "the backward"
        )


def asks_for_operators(dy: Tensor) -> bool:
    """Whether a backward is to be made of PyTorch's operators, which somebody else sees too.

    ``torch.autograd.grad(..., is_grads_batched=True)`` gives a wrapper without a transform.
    """
    return seen_through() or pointers.is_wrapper(dy)


def autograd_reason(frozen: Sequence[Tensor | None], trains: Sequence[Tensor | None]) -> str | None:
    """Why the fused operators do not apply and autograd must see plain PyTorch, or None.

    An operand that the adapters freeze (weight, factors) may ask for a gradient: rather than
    dropping that gradient, the plain expression gives it. Likewise for forward-mode derivatives,
    and for a trace of operands that train, which would record an operator without a gradient.
    """
    if wants_gradient(*frozen):
        return "an operand that is frozen in an adapter asks for a gradient"
    if torch.compiler.is_compiling():
        return None
    # Whether gradients are on is not asked: the check of a trace runs without them.
    if torch._C._get_tracing_state() is not None and asks_for_gradient(*trains):
        return "under torch.jit.trace, whose graph must have a gradient"
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "inside forward-mode differentiation"
    return None


def by_autograd(
    op: str,
    reason: str,
    backend: str | None,
    expression: Callable[[Any], Tensor],
    p: Operands,
) -> Tensor:
    """``expression``, the reference as autograd differentiates it; no other backend may be forced.

    Outside autocast, as the fused operators are: it would undo the reference's wide sums.
    """
    if not torch.compiler.is_compiling():
        autograd_choice(op, reason, backend)
    with outside_autocast(p.weight.device.type):
        return expression(p)
