"""Native CPU kernels (``qrlora_kernels._C``) for what library products do badly: few tokens, and
many small products.

The Kronecker update is many small products per token: the kernels keep them in the L1 cache, read x
and dy once and write the update once; the base product then accumulates onto it, in one rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..native import pointers
from ..reference import accumulation_dtype
from .base_product import linear_add
from .composed import add_base
from .low_rank import (
    DTYPES,
    lora_xs_linear_bwd,
    lora_xs_linear_fwd,
    qr_linear_bwd,
    qr_linear_fwd,
)
from .measured import streams_base
from .problem import Problem

__all__ = [
    "available",
    "kron_linear_bwd",
    "kron_linear_fwd",
    "lora_xs_linear_bwd",
    "lora_xs_linear_fwd",
    "qr_linear_bwd",
    "qr_linear_fwd",
    "supports",
]


def available() -> tuple[bool, str]:
    return native.CORE is not None, native.REASON


def supports(problem: Problem) -> tuple[bool, str]:
    if problem.device.type != "cpu":
        return False, "native kernels run on the CPU only"
    if native.CORE is None:
        return False, native.REASON
    if problem.op == "kron_linear":
        if problem.dtype not in DTYPES and problem.dtype != torch.float16:
            return False, f"no native kernel for {problem.dtype}"
        return True, "the Kronecker update in one native pass over the tokens"
    if problem.op == "linear_add":
        return False, "no native kernel for linear_add"
    if problem.dtype not in (torch.float32, torch.float64):
        return False, f"no native low-rank kernel for {problem.dtype}"
    return True, "one native call for a few tokens"


def kron_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    scaling: float,
) -> Tensor:
    """y = x Wᵀ + b + s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x on x [M, K]."""
    return _onto("fwd", kron_update(x, a, b, a0, b0, scaling), x, weight, bias)


def kron_update(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    scaling: float,
    tiles: bool = False,
) -> Tensor:
    """s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x [M, N] on x [M, K]; ``tiles``: on the AMX tile unit, in bf16."""
    xs, tokens = _rows(x)
    update = xs.new_empty(x.shape[0], a.numel())
    held, factors = _factors(a, b, a0, b0, scaling)
    native.core().kron_forward(_shape(xs, a, b), tokens, factors, *pointers.out(update), tiles)
    del held
    return update.to(x.dtype)


def kron_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    scaling: float,
    need_dx: bool = True,
    need_da: bool = True,
    need_db: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Per token S = X B, T = Aᵀ dY;  dA = s Σ dY Sᵀ;  dB = s Σ Xᵀ T;  dX = s (T Bᵀ − T₀ B₀ᵀ)."""
    dx, da, db = kron_gradients(dy, x, a, b, a0, b0, scaling, need_dx, need_da, need_db)
    return None if dx is None else _onto("bwd", dx, dy, weight.mT, None), da, db


def _onto(step: str, update: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b + update, in the update's place where the product allows it."""
    streamed = x.dtype in (torch.float32, torch.float64)
    if not (streamed and streams_base(step, x.shape[0], *weight.shape)):
        return add_base(update, x, weight, bias)
    linear_add(x, weight, bias, update, out=update)
    return update


def kron_gradients(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    scaling: float,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    tiles: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The update's share of dx, and dA and dB whole."""
    if not (need_dx or need_da or need_db):
        return None, None, None
    wide = accumulation_dtype(x.dtype)
    (xs, tokens), (dys, rows_of_dy) = _rows(x), _rows(dy)
    # Without dx the start does not matter: dA and dB are those of the whole product.
    start = (a0, b0) if need_dx else (None, None)
    held, factors = _factors(a, b, *start, scaling)
    dx = xs.new_empty(x.shape) if need_dx else None
    da = xs.new_empty(a.shape, dtype=wide) if need_da else None
    db = xs.new_empty(b.shape, dtype=wide) if need_db else None
    native.core().kron_backward(
        _shape(xs, a, b), rows_of_dy, tokens, factors,
        *pointers.out(dx, da, db), tiles,
    )  # fmt: skip
    del held, dys
    return (
        None if dx is None else dx.to(x.dtype),
        None if da is None else da.to(a.dtype),
        None if db is None else db.to(b.dtype),
    )


# --- operands as the native core takes them -----------------------------------------------------


def _shape(x: Tensor, a: Tensor, b: Tensor) -> tuple[int, ...]:
    return x.shape[0], *a.shape, b.shape[0], DTYPES[x.dtype], torch.get_num_threads()


def _factors(
    a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None, scaling: float
) -> tuple[list[Tensor | None], tuple[int | float, ...]]:
    """The tensors to hold until the kernel returns, and their addresses, type and s."""
    given: tuple[Tensor | None, ...] = (a, b, a0, b0)
    if a0 is None or b0 is None:
        given = (a, b, None, None)
    if a.dtype not in DTYPES:
        given = tuple(None if t is None else _typed(t) for t in given)
    held, addresses = pointers.dense(*given)
    return held, (*addresses, DTYPES[held[0].dtype], scaling)


def _rows(t: Tensor) -> tuple[Tensor, tuple[int, int]]:
    held, (at, row, _) = pointers.rows(_typed(t))
    return held, (at, row)


def _typed(t: Tensor) -> Tensor:
    """``t`` in a type that the kernels read: fp16 is converted to fp32, and results back."""
    return t if t.dtype in DTYPES else pointers.checked(t).float()
