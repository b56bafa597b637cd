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

from .common import INTERPRETED, dot, load_tile, narrow


@triton.jit
def _factor(a, a0, row, rows, R, like, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows of A, or of A − A₀ taken before the rounding to the dtype of ``like``."""
    tile = load_tile(a, row, 0, rows, R, R, 1, BLOCK, BLOCK_R, False)
    if a0 is not None:
        start = load_tile(a0, row, 0, rows, R, R, 1, BLOCK, BLOCK_R, False)
        tile = tile.to(tl.float32) - start.to(tl.float32)
    if INTERPRETED:
        return tile.to(tl.float32)
    else:
        return tile.to(like.dtype.element_ty)


@triton.jit
def _turn(s, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):
    """Transpose each token's [BLOCK_R, BLOCK_R] among the rows (token, row)."""
    s = tl.permute(tl.reshape(s, (BLOCK_T, BLOCK_R, BLOCK_R)), (0, 2, 1))
    return tl.reshape(s, (BLOCK_T * BLOCK_R, BLOCK_R))


@triton.jit
def _token_offsets(block, stride_m, M, R, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows (token, index) of a step: offset of the token, the index, and which rows exist."""
    rows = tl.arange(0, BLOCK_T * BLOCK_R)
    token = tl.cast(block, tl.int64) * BLOCK_T + rows // BLOCK_R
    index = rows % BLOCK_R
    return token * stride_m, index, (token < M) & (index < R)


@triton.jit
def _load_tokens(
    x, block, stride_m, stride_k, M, R, KB,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X of BLOCK_T tokens: rows (token, l), columns of X."""
    base, index, exists = _token_offsets(block, stride_m, M, R, BLOCK_T, BLOCK_R)
    c = tl.arange(0, BLOCK_K)
    inner = (index[:, None] * KB + c[None, :]).to(tl.int64) * stride_k
    return tl.load(x + base[:, None] + inner, mask=exists[:, None] & (c < KB)[None, :], other=0.0)


@triton.jit
def _store_turned(
    out, y, block, stride_m, M, R, first, NA,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write Yᵀ, rows (token, j) and columns first + i, to y[token, i * R + j]."""
    base, index, exists = _token_offsets(block, stride_m, M, R, BLOCK_T, BLOCK_R)
    i = first + tl.arange(0, BLOCK_N)
    offsets = base[:, None] + (i[None, :] * R + index[:, None])
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=exists[:, None] & (i < NA)[None, :])


@triton.jit
def _kron_fwd_kernel(
    x, a, b, a0, b0, out, scaling, M, NA, KB, R, stride_xm, stride_xk, stride_om,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ONE_CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [M, N] = the update alone; A is taken in chunks of BLOCK_N rows where it is long."""
    right = _factor(b, None, 0, KB, R, x, BLOCK_K, BLOCK_R)
    if b0 is not None:
        right_change = _factor(b, b0, 0, KB, R, x, BLOCK_K, BLOCK_R)
    if ONE_CHUNK:
        left = _factor(a, a0, 0, NA, R, x, BLOCK_N, BLOCK_R).T
        if a0 is not None:
            left_start = _factor(a0, None, 0, NA, R, x, BLOCK_N, BLOCK_R).T

    zero = tl.zeros((BLOCK_T * BLOCK_R, BLOCK_R), dtype=tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_T), tl.num_programs(0)):
        tokens = _load_tokens(
            x, block, stride_xm, stride_xk, M, R, KB, BLOCK_T, BLOCK_R, BLOCK_K
        )
        s = _turn(narrow(dot(tokens, right, zero, PRECISION), tokens), BLOCK_T, BLOCK_R)
        if b0 is not None:
            s_change = dot(tokens, right_change, zero, PRECISION)
            s_change = _turn(narrow(s_change, tokens), BLOCK_T, BLOCK_R)
        for first in tl.range(0, NA, BLOCK_N, num_stages=1):
            if not ONE_CHUNK:
                left = _factor(a, a0, first, NA, R, x, BLOCK_N, BLOCK_R).T
                if a0 is not None:
                    left_start = _factor(a0, None, first, NA, R, x, BLOCK_N, BLOCK_R).T
            y = tl.zeros((BLOCK_T * BLOCK_R, BLOCK_N), dtype=tl.float32)
            y = dot(s, left, y, PRECISION)
            if a0 is not None:
                y = dot(s_change, left_start, y, PRECISION)
            y *= tl.cast(scaling, tl.float32)
            _store_turned(out, y, block, stride_om, M, R, first, NA, BLOCK_T, BLOCK_R, BLOCK_N)


@triton.jit
def _load_turned(
    dy, block, stride_m, stride_n, M, R, NA,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dYᵀ of BLOCK_T tokens: rows (token, j), columns i."""
    base, index, exists = _token_offsets(block, stride_m, M, R, BLOCK_T, BLOCK_R)
    i = tl.arange(0, BLOCK_N)
    inner = (i[None, :] * R + index[:, None]).to(tl.int64) * stride_n
    return tl.load(dy + base[:, None] + inner, mask=exists[:, None] & (i < NA)[None, :], other=0.0)


@triton.jit
def _store_tokens(
    out, dx, block, stride_m, M, R, KB,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write dX, rows (token, l), to dx[token, l * KB + c]."""
    base, index, exists = _token_offsets(block, stride_m, M, R, BLOCK_T, BLOCK_R)
    c = tl.arange(0, BLOCK_K)
    offsets = base[:, None] + (index[:, None] * KB + c[None, :])
    tl.store(out + offsets, dx.to(out.dtype.element_ty), mask=exists[:, None] & (c < KB)[None, :])


@triton.jit
def _store_part(parts, acc, rows, R, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr):
    """This program's share of a factor's gradient [rows, R]."""
    own = parts + tl.cast(tl.program_id(0), tl.int64) * rows * R
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK_R)
    mask = (i < rows)[:, None] & (j < R)[None, :]
    tl.store(own + i[:, None] * R + j[None, :], acc, mask=mask)


@triton.jit
def _kron_bwd_kernel(
    dy, x, a, b, a0, b0, dx, da, db, scaling, M, NA, KB, R,
    stride_dm, stride_dn, stride_xm, stride_xk, stride_om,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx = the update's share; da, db: each program's unscaled parts. Each may be None."""
    DIFFERENCE: tl.constexpr = a0 is not None and dx is not None
    right = _factor(b, None, 0, KB, R, x, BLOCK_K, BLOCK_R)
    if DIFFERENCE:
        left = _factor(a, a0, 0, NA, R, x, BLOCK_N, BLOCK_R)
        left_start = _factor(a0, None, 0, NA, R, x, BLOCK_N, BLOCK_R)
        right_change = _factor(b, b0, 0, KB, R, x, BLOCK_K, BLOCK_R)
    else:
        left = _factor(a, None, 0, NA, R, x, BLOCK_N, BLOCK_R)
    acc_a = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    acc_b = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    zero = tl.zeros((BLOCK_T * BLOCK_R, BLOCK_R), dtype=tl.float32)

    for block in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_T), tl.num_programs(0)):
        grads = _load_turned(dy, block, stride_dm, stride_dn, M, R, NA, BLOCK_T, BLOCK_R, BLOCK_N)
        if da is not None or db is not None:
            tokens = _load_tokens(
                x, block, stride_xm, stride_xk, M, R, KB, BLOCK_T, BLOCK_R, BLOCK_K
            )
        if da is not None:
            s = narrow(dot(tokens, right, zero, PRECISION), tokens)
            acc_a = dot(grads.T, _turn(s, BLOCK_T, BLOCK_R), acc_a, PRECISION)
        if db is not None or dx is not None:
            # With a start, t is the share of A − A₀ and t + t_start that of A.
            t = dot(grads, left, zero, PRECISION)
            t_whole = t
            if DIFFERENCE:
                t_start = dot(grads, left_start, zero, PRECISION)
                t_whole = t + t_start
            if db is not None:
                t_rows = _turn(narrow(t_whole, grads), BLOCK_T, BLOCK_R)
                acc_b = dot(tokens.T, t_rows, acc_b, PRECISION)
            if dx is not None:
                update = tl.zeros((BLOCK_T * BLOCK_R, BLOCK_K), dtype=tl.float32)
                t_rows = _turn(narrow(t, grads), BLOCK_T, BLOCK_R)
                update = dot(t_rows, right.T, update, PRECISION)
                if DIFFERENCE:
                    t_rows = _turn(narrow(t_start, grads), BLOCK_T, BLOCK_R)
                    update = dot(t_rows, right_change.T, update, PRECISION)
                update *= tl.cast(scaling, tl.float32)
                _store_tokens(dx, update, block, stride_om, M, R, KB, BLOCK_T, BLOCK_R, BLOCK_K)
    if da is not None:
        _store_part(da, acc_a, NA, R, BLOCK_N, BLOCK_R)
    if db is not None:
        _store_part(db, acc_b, KB, R, BLOCK_K, BLOCK_R)
