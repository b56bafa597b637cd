"""Device code of the Kronecker update s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x, forward and backward.

A token x of K values is X [r, K/r]; S = X B [r, r] and Y = A S [N/r, r]. A program takes BLOCK_T
tokens a step and holds them as rows (token, row of X), so X B is one product; turning each token's
S over gives rows (token, column), and Yᵀ = Sᵀ Aᵀ is one product again. S and T = Aᵀ dY never leave
the chip.

The difference from the start is taken as (A − A₀) X B + A₀ X (B − B₀): each term is as small as the
update, so rounding S to half precision costs no more than the update's own last bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, narrow


@triton.jit
def _factor(a, a0, row, rows, R, DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows of A, or of A − A₀ taken before the rounding to DTYPE. A factor fits int32 offsets."""
    i = row + tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK_R)
    offsets = i[:, None] * R + j[None, :]
    mask = (i < rows)[:, None] & (j < R)[None, :]
    tile = tl.load(a + offsets, mask=mask, other=0.0)
    if a0 is not None:
        tile = tile.to(tl.float32) - tl.load(a0 + offsets, mask=mask, other=0.0).to(tl.float32)
    return narrow(tile, DTYPE)


@triton.jit
def _turn(s, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):
    """Transpose each token's [BLOCK_R, BLOCK_R] among the rows (token, row)."""
    s = tl.permute(tl.reshape(s, (BLOCK_T, BLOCK_R, BLOCK_R)), (0, 2, 1))
    return tl.reshape(s, (BLOCK_T * BLOCK_R, BLOCK_R))


# A token's values form a matrix. The X side holds it as rows [R, C], the Y side turned over, as the
# columns of [C, R]; TURNED says which. A descriptor sees [M, R, C] or [M, C, R] in memory.


@triton.jit
def _places(
    step, stride_m, M, R, first, C,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Of rows (token, index of R) and columns from ``first`` on: where their token begins, where
    they are within it, and which exist."""
    rows = tl.arange(0, BLOCK_T * BLOCK_R)
    token = tl.cast(step, tl.int64) * BLOCK_T + rows // BLOCK_R
    index = rows % BLOCK_R
    c = first + tl.arange(0, BLOCK_C)
    within = c[None, :] * R + index[:, None] if TURNED else index[:, None] * C + c[None, :]
    exists = (token < M) & (index < R)
    return (token * stride_m)[:, None], within, exists[:, None] & (c < C)[None, :]


@triton.jit
def _load_tokens(
    src, step, stride_m, M, R, C,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    TURNED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows (token, index of R), columns C, zero outside."""
    if TMA:
        tile = src.load([step * BLOCK_T, 0, 0])
        if TURNED and BLOCK_T == 1:
            # In two dimensions the compiler turns the view of shared memory, not the values.
            tile = tl.reshape(tile, (BLOCK_C, BLOCK_R)).T
        else:
            if TURNED:
                tile = tl.permute(tile, (0, 2, 1))
            tile = tl.reshape(tile, (BLOCK_T * BLOCK_R, BLOCK_C))
    else:
        base, within, exists = _places(
            step, stride_m, M, R, 0, C, BLOCK_T, BLOCK_R, BLOCK_C, TURNED
        )
        tile = tl.load(src + base + within, mask=exists, other=0.0)
    return tile


@triton.jit
def _store_tokens(
    dst, tile, step, stride_m, M, R, first, C,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    TURNED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The counterpart of ``_load_tokens``, for the columns from ``first`` on."""
    if TMA:
        tile = tl.reshape(tile.to(dst.dtype), (BLOCK_T, BLOCK_R, BLOCK_C))
        if TURNED:
            dst.store([step * BLOCK_T, first, 0], tl.permute(tile, (0, 2, 1)))
        else:
            dst.store([step * BLOCK_T, 0, first], tile)
    else:
        base, within, exists = _places(
            step, stride_m, M, R, first, C, BLOCK_T, BLOCK_R, BLOCK_C, TURNED
        )
        tl.store(dst + base + within, tile.to(dst.dtype.element_ty), mask=exists)


@triton.jit
def _share_of_y(
    out, s, s_change, left, left_start, scaling, step, stride_om, M, R, first, NA,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows ``first``.. of Y = A S, from the turned S."""
    y = tl.zeros((BLOCK_T * BLOCK_R, BLOCK_N), dtype=tl.float32)
    y = dot(s, left, y, PRECISION)
    if left_start is not None:
        y = dot(s_change, left_start, y, PRECISION)
    y *= tl.cast(scaling, tl.float32)
    _store_tokens(out, y, step, stride_om, M, R, first, NA, BLOCK_T, BLOCK_R, BLOCK_N, True, TMA)


@triton.jit
def _kron_fwd_kernel(
    x, a, b, a0, b0, out, scaling, M, NA, KB, R, stride_xm, stride_om,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ONE_CHUNK: tl.constexpr, TMA: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [M, N] = the update alone; A is taken in chunks of BLOCK_N rows where it is long."""
    right = _factor(b, None, 0, KB, R, DTYPE, BLOCK_K, BLOCK_R)
    left_start = None
    if b0 is not None:
        right_change = _factor(b, b0, 0, KB, R, DTYPE, BLOCK_K, BLOCK_R)
    if ONE_CHUNK:
        left = _factor(a, a0, 0, NA, R, DTYPE, BLOCK_N, BLOCK_R).T
        if a0 is not None:
            left_start = _factor(a0, None, 0, NA, R, DTYPE, BLOCK_N, BLOCK_R).T

    zero = tl.zeros((BLOCK_T * BLOCK_R, BLOCK_R), dtype=tl.float32)
    for step in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_T), tl.num_programs(0)):
        x_tile = _load_tokens(x, step, stride_xm, M, R, KB, BLOCK_T, BLOCK_R, BLOCK_K, False, TMA)
        s = _turn(narrow(dot(x_tile, right, zero, PRECISION), DTYPE), BLOCK_T, BLOCK_R)
        s_change = s
        if b0 is not None:
            s_change = narrow(dot(x_tile, right_change, zero, PRECISION), DTYPE)
            s_change = _turn(s_change, BLOCK_T, BLOCK_R)
        if ONE_CHUNK:
            _share_of_y(
                out, s, s_change, left, left_start, scaling, step, stride_om, M, R, 0, NA,
                BLOCK_T, BLOCK_R, BLOCK_N, TMA, PRECISION,
            )  # fmt: skip
        else:
            for first in tl.range(0, NA, BLOCK_N, num_stages=1):
                part = _factor(a, a0, first, NA, R, DTYPE, BLOCK_N, BLOCK_R).T
                part_start = None
                if a0 is not None:
                    part_start = _factor(a0, None, first, NA, R, DTYPE, BLOCK_N, BLOCK_R).T
                _share_of_y(
                    out, s, s_change, part, part_start, scaling, step, stride_om, M, R, first, NA,
                    BLOCK_T, BLOCK_R, BLOCK_N, TMA, PRECISION,
                )  # fmt: skip


@triton.jit
def _store_part(parts, acc, rows, R, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr):
    """This program's share of a factor's gradient [rows, R]."""
    own = parts + tl.cast(tl.program_id(0), tl.int64) * rows * R
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK_R)
    mask = (i < rows)[:, None] & (j < R)[None, :]
    tl.store(own + (i[:, None] * R + j[None, :]), acc, mask=mask)


@triton.jit
def _kron_bwd_kernel(
    dy, x, a, b, a0, b0, dx, da, db, scaling, M, NA, KB, R, stride_dm, stride_xm, stride_om,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx = the update's share; da, db: each program's unscaled parts. Each may be None."""
    DIFFERENCE: tl.constexpr = a0 is not None and dx is not None
    right = _factor(b, None, 0, KB, R, DTYPE, BLOCK_K, BLOCK_R)
    if DIFFERENCE:
        left = _factor(a, a0, 0, NA, R, DTYPE, BLOCK_N, BLOCK_R)
        left_start = _factor(a0, None, 0, NA, R, DTYPE, BLOCK_N, BLOCK_R)
        right_change = _factor(b, b0, 0, KB, R, DTYPE, BLOCK_K, BLOCK_R)
    else:
        left = _factor(a, None, 0, NA, R, DTYPE, BLOCK_N, BLOCK_R)
    acc_a = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    acc_b = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    zero = tl.zeros((BLOCK_T * BLOCK_R, BLOCK_R), dtype=tl.float32)

    for step in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_T), tl.num_programs(0)):
        dy_tile = _load_tokens(dy, step, stride_dm, M, R, NA, BLOCK_T, BLOCK_R, BLOCK_N, True, TMA)
        if da is not None or db is not None:
            x_tile = _load_tokens(
                x, step, stride_xm, M, R, KB, BLOCK_T, BLOCK_R, BLOCK_K, False, TMA
            )
        if da is not None:
            s = narrow(dot(x_tile, right, zero, PRECISION), DTYPE)
            acc_a = dot(dy_tile.T, _turn(s, BLOCK_T, BLOCK_R), acc_a, PRECISION)
        if db is not None or dx is not None:
            # With a start, t is the share of A − A₀ and t + t_start that of A.
            t = dot(dy_tile, left, zero, PRECISION)
            t_whole = t
            if DIFFERENCE:
                t_start = dot(dy_tile, left_start, zero, PRECISION)
                t_whole = t + t_start
            if db is not None:
                t_rows = _turn(narrow(t_whole, DTYPE), BLOCK_T, BLOCK_R)
                acc_b = dot(x_tile.T, t_rows, acc_b, PRECISION)
            if dx is not None:
                update = tl.zeros((BLOCK_T * BLOCK_R, BLOCK_K), dtype=tl.float32)
                t_rows = _turn(narrow(t, DTYPE), BLOCK_T, BLOCK_R)
                update = dot(t_rows, right.T, update, PRECISION)
                if DIFFERENCE:
                    t_rows = _turn(narrow(t_start, DTYPE), BLOCK_T, BLOCK_R)
                    update = dot(t_rows, right_change.T, update, PRECISION)
                update *= tl.cast(scaling, tl.float32)
                _store_tokens(
                    dx, update, step, stride_om, M, R, 0, KB,
                    BLOCK_T, BLOCK_R, BLOCK_K, False, TMA,
                )  # fmt: skip
    if da is not None:
        _store_part(da, acc_a, NA, R, BLOCK_N, BLOCK_R)
    if db is not None:
        _store_part(db, acc_b, KB, R, BLOCK_K, BLOCK_R)
