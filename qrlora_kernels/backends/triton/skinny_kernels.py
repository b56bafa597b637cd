"""Device code of the skinny products p = x bᵀ with few columns, and of what follows them.

Forward, x holds the layer's input and p is h; backward, x holds dy and p is g. The end of the same
kernel applies the gate, which is λ [r] or the core C [r, r], and takes the gate's gradient, so p
needs no second trip through memory. Where there are too few tokens to fill the GPU the reduction is
split: each part goes to ``partial`` and ``_finish_kernel`` sums the parts in a fixed order.

The rank is covered by two accumulators of BLOCK_R0 and BLOCK_R1 columns (BLOCK_R1 may be 0).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, load_reduced, load_tile, narrow, store_tile


@triton.jit
def _gate_columns(
    acc,
    saved,
    scaled,
    gate,
    grad,
    scaling,
    tile_m,
    col,
    M,
    R,
    stride_hm,
    stride_um,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """λ on some columns of p: forward emits h and s·λ∘h; backward Σ_m h∘g and s·λ∘g."""
    row = tile_m * BLOCK_M
    cols = col + tl.arange(0, BLOCK_R)
    if BACKWARD:
        if grad is not None:
            h = load_tile(saved, row, col, M, R, stride_hm, 1, BLOCK_M, BLOCK_R, False)
            part = tl.sum(acc * h.to(tl.float32), 0)
            tl.store(grad + tl.cast(tile_m, tl.int64) * R + cols, part, mask=cols < R)
    else:
        store_tile(saved, acc, row, col, M, R, stride_hm, 1, BLOCK_M, BLOCK_R, False)
    if scaled is not None:
        lam = tl.load(gate + cols, mask=cols < R, other=0.0).to(tl.float32)
        out = acc * (lam * tl.cast(scaling, tl.float32))[None, :]
        store_tile(scaled, out, row, col, M, R, stride_um, 1, BLOCK_M, BLOCK_R, False)


@triton.jit
def _core_product(
    acc0,
    acc1,
    scaled,
    core,
    scaling,
    row,
    M,
    R,
    stride_um,
    stride_in,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_R0: tl.constexpr,
    BLOCK_R1: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scaled = s · p C, with C[i, j] at i * stride_in + j * stride_out, BLOCK_J columns a time."""
    for j in tl.range(0, R, BLOCK_J, num_stages=1):
        core0 = load_tile(core, 0, j, R, R, stride_in, stride_out, BLOCK_R0, BLOCK_J, False)
        out = tl.zeros((BLOCK_M, BLOCK_J), dtype=tl.float32)
        out = dot(acc0, core0.to(tl.float32), out, PRECISION)
        if BLOCK_R1 > 0:
            core1 = load_tile(
                core, BLOCK_R0, j, R, R, stride_in, stride_out, BLOCK_R1, BLOCK_J, False
            )
            out = dot(acc1, core1.to(tl.float32), out, PRECISION)
        out *= tl.cast(scaling, tl.float32)
        store_tile(scaled, out, row, j, M, R, stride_um, 1, BLOCK_M, BLOCK_J, False)


@triton.jit
def _core_gradient(
    acc,
    saved,
    grad,
    row,
    col,
    M,
    R,
    stride_hm,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns col.. of this tile's hᵀ g [R, R], BLOCK_I rows a time."""
    for i in tl.range(0, R, BLOCK_I, num_stages=1):
        h = load_tile(saved, row, i, M, R, stride_hm, 1, BLOCK_M, BLOCK_I, False)
        part = tl.zeros((BLOCK_I, BLOCK_R), dtype=tl.float32)
        part = dot(h.T, narrow(acc, h.dtype), part, PRECISION)
        store_tile(grad, part, i, col, R, R, R, 1, BLOCK_I, BLOCK_R, False)


@triton.jit
def _finish(
    acc0,
    acc1,
    saved,
    scaled,
    gate,
    grad,
    scaling,
    tile_m,
    col,
    M,
    R,
    stride_hm,
    stride_um,
    BLOCK_M: tl.constexpr,
    BLOCK_R0: tl.constexpr,
    BLOCK_R1: tl.constexpr,
    BLOCK_J: tl.constexpr,
    CORE: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Everything that follows p, while p is still in registers."""
    if CORE:
        row = tile_m * BLOCK_M
        if BACKWARD:
            if grad is not None:
                own = grad + tl.cast(tile_m, tl.int64) * R * R
                _core_gradient(
                    acc0, saved, own, row, 0, M, R, stride_hm, BLOCK_M, BLOCK_R0, BLOCK_J, PRECISION
                )
                if BLOCK_R1 > 0:
                    _core_gradient(
                        acc1, saved, own, row, BLOCK_R0, M, R, stride_hm,
                        BLOCK_M, BLOCK_R1, BLOCK_J, PRECISION,
                    )  # fmt: skip
        else:
            store_tile(saved, acc0, row, 0, M, R, stride_hm, 1, BLOCK_M, BLOCK_R0, False)
            if BLOCK_R1 > 0:
                store_tile(saved, acc1, row, BLOCK_R0, M, R, stride_hm, 1, BLOCK_M, BLOCK_R1, False)
        if scaled is not None:
            _core_product(
                acc0, acc1, scaled, gate, scaling, row, M, R, stride_um,
                1 if BACKWARD else R, R if BACKWARD else 1,
                BLOCK_M, BLOCK_R0, BLOCK_R1, BLOCK_J, PRECISION,
            )  # fmt: skip
    else:
        _gate_columns(
            acc0, saved, scaled, gate, grad, scaling, tile_m, col, M, R, stride_hm, stride_um,
            BLOCK_M, BLOCK_R0, BACKWARD,
        )  # fmt: skip
        if BLOCK_R1 > 0:
            _gate_columns(
                acc1, saved, scaled, gate, grad, scaling, tile_m, col + BLOCK_R0, M, R,
                stride_hm, stride_um, BLOCK_M, BLOCK_R1, BACKWARD,
            )  # fmt: skip


@triton.jit
def _project_kernel(
    x,
    b0,
    b1,
    partial,
    saved,
    scaled,
    gate,
    grad,
    scaling,
    M,
    K,
    R,
    span,
    splits,
    stride_xm,
    stride_xk,
    stride_br,
    stride_bk,
    stride_hm,
    stride_um,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R0: tl.constexpr,
    BLOCK_R1: tl.constexpr,
    BLOCK_J: tl.constexpr,
    B_OUT_ROWS: tl.constexpr,
    TMA_X: tl.constexpr,
    TMA_B: tl.constexpr,
    CORE: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """p [M, R] = x [M, K] b [R, K]ᵀ; program: token tile, then rank tile, then part of K."""
    pid = tl.program_id(0)
    split = pid % splits
    rank_tiles = tl.cdiv(R, BLOCK_R0 + BLOCK_R1)
    col = (pid // splits) % rank_tiles * (BLOCK_R0 + BLOCK_R1)
    tile_m = pid // splits // rank_tiles
    row = tile_m * BLOCK_M

    acc0 = tl.zeros((BLOCK_M, BLOCK_R0), dtype=tl.float32)
    acc1 = tl.zeros((BLOCK_M, BLOCK_R1 if BLOCK_R1 > 0 else 16), dtype=tl.float32)
    for k in tl.range(split * span, min(K, (split + 1) * span), BLOCK_K):
        x_tile = load_tile(x, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, TMA_X)
        b_tile = load_reduced(
            b0, col, k, R, K, stride_br, stride_bk, BLOCK_R0, BLOCK_K, B_OUT_ROWS, TMA_B
        )
        acc0 = dot(x_tile, b_tile, acc0, PRECISION)
        if BLOCK_R1 > 0:
            b_tile = load_reduced(
                b1, col + BLOCK_R0, k, R, K, stride_br, stride_bk,
                BLOCK_R1, BLOCK_K, B_OUT_ROWS, TMA_B,
            )  # fmt: skip
            acc1 = dot(x_tile, b_tile, acc1, PRECISION)

    if partial is None:
        _finish(
            acc0, acc1, saved, scaled, gate, grad, scaling, tile_m, col, M, R, stride_hm, stride_um,
            BLOCK_M, BLOCK_R0, BLOCK_R1, BLOCK_J, CORE, BACKWARD, PRECISION,
        )  # fmt: skip
    else:
        part = partial + tl.cast(split, tl.int64) * M * R
        store_tile(part, acc0, row, col, M, R, R, 1, BLOCK_M, BLOCK_R0, False)
        if BLOCK_R1 > 0:
            store_tile(part, acc1, row, col + BLOCK_R0, M, R, R, 1, BLOCK_M, BLOCK_R1, False)


@triton.jit
def _finish_kernel(
    partial,
    saved,
    scaled,
    gate,
    grad,
    scaling,
    M,
    R,
    splits,
    stride_hm,
    stride_um,
    BLOCK_M: tl.constexpr,
    BLOCK_R0: tl.constexpr,
    BLOCK_R1: tl.constexpr,
    BLOCK_J: tl.constexpr,
    CORE: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum the parts of p in their order, then what follows p."""
    pid = tl.program_id(0)
    rank_tiles = tl.cdiv(R, BLOCK_R0 + BLOCK_R1)
    col = pid % rank_tiles * (BLOCK_R0 + BLOCK_R1)
    tile_m = pid // rank_tiles
    row = tile_m * BLOCK_M
    acc0 = tl.zeros((BLOCK_M, BLOCK_R0), dtype=tl.float32)
    acc1 = tl.zeros((BLOCK_M, BLOCK_R1 if BLOCK_R1 > 0 else 16), dtype=tl.float32)
    for split in tl.range(0, splits):
        part = partial + tl.cast(split, tl.int64) * M * R
        acc0 += load_tile(part, row, col, M, R, R, 1, BLOCK_M, BLOCK_R0, False)
        if BLOCK_R1 > 0:
            acc1 += load_tile(part, row, col + BLOCK_R0, M, R, R, 1, BLOCK_M, BLOCK_R1, False)
    _finish(
        acc0, acc1, saved, scaled, gate, grad, scaling, tile_m, col, M, R, stride_hm, stride_um,
        BLOCK_M, BLOCK_R0, BLOCK_R1, BLOCK_J, CORE, BACKWARD, PRECISION,
    )  # fmt: skip
