"""Steps as one native call each, on operands that are checked (csrc/core).

A code names the column of kernels that runs and, for OHoRA, whether the base product is in the
call; ``cpu`` and ``amx`` say which problems go where. With few tokens the calls themselves take the
time, so each step makes one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..native import DTYPES, pointers
from ..operands import Kron, KronGradient, LowRank, LowRankGradient, is_core
from ..reference import accumulation_dtype

NO_PANELS = (0, 0, 0)
# Added to the code of a column: the base product is the caller's; the operands are in panels.
_UPDATE_ALONE, _BY_PANELS = 16, 32


@functools.cache
def code(column: str | None = None, update_alone: bool = False, by_panels: bool = False) -> int:
    """The code of a column of kernels; without a name that of the instruction set in use."""
    core = native.core()
    at = core.best_column() if column is None else core.columns.index(column)
    return int(1 + at + _UPDATE_ALONE * update_alone + _BY_PANELS * by_panels)


# --- low rank -----------------------------------------------------------------------------------


def low_rank_fwd(
    p: LowRank, code: int, panels: tuple[int, ...] = NO_PANELS
) -> tuple[Tensor, Tensor]:
    """y [M, N] and h [M, r]; ``panels``: where the frozen operands are kept so, in their order."""
    m, r = p.x.shape[0], p.gate.shape[-1]
    held, (tokens, *frozen, (gate_at, bias_at, index_at)) = _read(p, p.x, p.bias)
    # On the device of x: the default device may be another.
    y, h = p.x.new_empty(m, p.weight.shape[0]), p.x.new_empty(m, r)
    native.core().low_rank_forward(
        code, _low_rank_shape(p, p.x), tokens, *frozen, _gate(p, gate_at),
        bias_at, *pointers.out(y, h), index_at, _adapters(p), panels,
    )  # fmt: skip
    del held
    return y, h


def low_rank_bwd(
    p: LowRankGradient, code: int, panels: tuple[int, ...] = NO_PANELS
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] and the gate's gradient, likewise."""
    if not (p.need_dx or p.need_dgate):
        return None, None
    m, dtype = p.dy.shape[0], p.dy.dtype
    held, (rows_of_dy, *frozen, (gate_at, h_at, index_at)) = _read(p, p.dy, p.h)
    dx = p.dy.new_empty(m, p.weight.shape[1]) if p.need_dx else None
    wide = accumulation_dtype(dtype)
    dgate = p.dy.new_empty(p.gate.shape, dtype=wide) if p.need_dgate else None
    native.core().low_rank_backward(
        code, _low_rank_shape(p, p.dy), rows_of_dy, *frozen, _gate(p, gate_at),
        h_at, *pointers.out(dx, dgate), index_at, _adapters(p), panels,
    )  # fmt: skip
    del held
    return dx, None if dgate is None else dgate.to(p.gate.dtype)


def _low_rank_shape(p: LowRank | LowRankGradient, rows: Tensor) -> tuple[int, ...]:
    r = p.gate.shape[-1]
    return rows.shape[0], *p.weight.shape, r, DTYPES[rows.dtype], torch.get_num_threads()


def _gate(p: LowRank | LowRankGradient, at: int) -> tuple[int | float | bool, ...]:
    return at, DTYPES[p.gate.dtype], is_core(p), p.scaling


def _adapters(p: LowRank | LowRankGradient) -> int:
    return 1 if p.index is None else p.gate.shape[0]


def _read(
    p: LowRank | LowRankGradient, rows: Tensor, dense: Tensor | None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The tensors to hold until the kernel returns, and what it is given of them."""
    assert p.down is not None
    held, given = zip(
        pointers.rows(rows),
        pointers.matrix(p.weight, "weight"),
        pointers.matrix(p.down),
        pointers.matrix(p.up),
        pointers.dense(p.gate, dense, p.index),
        strict=True,
    )
    return held, given


# --- a given update -----------------------------------------------------------------------------


def linear_add(
    code: int, x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor, out: Tensor
) -> None:
    """out = x Wᵀ + b + addend on x [M, K]; addend and out [M, N] may be the same."""
    held, (tokens, w, vectors) = zip(
        pointers.rows(x, "x"), pointers.matrix(weight, "weight"), pointers.dense(bias, addend),
        strict=True,
    )  # fmt: skip
    native.core().linear_add(
        code, (*out.shape, x.shape[1], DTYPES[x.dtype], torch.get_num_threads()),
        tokens, w, *vectors, *pointers.out(out),
    )  # fmt: skip
    del held


# --- Kronecker ----------------------------------------------------------------------------------


def kron_update(p: Kron, code: int) -> Tensor:
    """s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x [M, N] on x [M, K]."""
    x, tokens = _rows(p.x)
    update = x.new_empty(x.shape[0], p.a.numel())
    held, factors = _factors(p.a, p.b, p.a0, p.b0, p.scaling)
    native.core().kron_forward(code, _kron_shape(p, x), tokens, factors, *pointers.out(update))
    del held
    return update.to(p.x.dtype)


def kron_gradients(
    p: KronGradient, code: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The update's share of dx, and dA and dB whole."""
    if not (p.need_dx or p.need_da or p.need_db):
        return None, None, None
    wide = accumulation_dtype(p.x.dtype)
    (x, tokens), (dy, rows_of_dy) = _rows(p.x), _rows(p.dy)
    # Without dx the start does not matter: dA and dB are those of the whole product.
    start = (p.a0, p.b0) if p.need_dx else (None, None)
    held, factors = _factors(p.a, p.b, *start, p.scaling)
    dx = x.new_empty(x.shape) if p.need_dx else None
    da = x.new_empty(p.a.shape, dtype=wide) if p.need_da else None
    db = x.new_empty(p.b.shape, dtype=wide) if p.need_db else None
    native.core().kron_backward(
        code, _kron_shape(p, x), rows_of_dy, tokens, factors, *pointers.out(dx, da, db)
    )
    del held, dy
    return (
        None if dx is None else dx.to(p.x.dtype),
        None if da is None else da.to(p.a.dtype),
        None if db is None else db.to(p.b.dtype),
    )


def _kron_shape(p: Kron | KronGradient, x: Tensor) -> tuple[int, ...]:
    return x.shape[0], *p.a.shape, p.b.shape[0], DTYPES[x.dtype], torch.get_num_threads()


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
