"""One product of two pairs: out = x wᵀ + u vᵀ (+ bias) (+ start), in one fp32 accumulator.

The main loop first walks the frozen layer's reduction, then the adapter's rank. The adapter's part
is added to the fp32 accumulator and the sum is rounded once, so an update that is tiny beside the
base output is not lost, and the frozen output makes no second trip through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import dot, load_reduced, load_tile, store_tile
from .tables import gemm_tile, rank_step


@triton.jit
def _two_phase_kernel(
    x,
    w,
    u,
    v,
    out,
    bias,
    start,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_um,
    stride_vn,
    stride_vr,
    stride_om,
    stride_sm,
    stride_sn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    W_OUT_ROWS: tl.constexpr,
    V_OUT_ROWS: tl.constexpr,
    TMA: tl.constexpr,
    TMA_LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    GROUP_M: tl.constexpr = 8
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        # Neighbouring programs share rows of x and of w, so that both are found in L2.
        group = tile // (GROUP_M * tiles_n)
        group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
        within = tile % (GROUP_M * tiles_n)
        m = (group * GROUP_M + within % group_rows) * BLOCK_M
        n = (within // group_rows) * BLOCK_N

        if start is None:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        else:
            acc = load_tile(start, m, n, M, N, stride_sm, stride_sn, BLOCK_M, BLOCK_N, False).to(
                tl.float32
            )
        for k in tl.range(0, K, BLOCK_K):
            x_tile = load_tile(x, m, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, TMA)
            w_tile = load_reduced(
                w, n, k, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, W_OUT_ROWS, TMA
            )
            acc = dot(x_tile, w_tile, acc, PRECISION)
        if u is not None:
            for k in tl.range(0, R, BLOCK_R):
                u_tile = load_tile(u, m, k, M, R, stride_um, 1, BLOCK_M, BLOCK_R, TMA_LOW)
                v_tile = load_reduced(
                    v, n, k, N, R, stride_vn, stride_vr, BLOCK_N, BLOCK_R, V_OUT_ROWS, TMA_LOW
                )
                acc = dot(u_tile, v_tile, acc, PRECISION)
        if bias is not None:
            cols = n + tl.arange(0, BLOCK_N)
            acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        store_tile(out, acc, m, n, M, N, stride_om, 1, BLOCK_M, BLOCK_N, TMA)


Pair = tuple[Tensor, Tensor]


def two_phase(
    xw: Pair, uv: Pair | None = None, bias: Tensor | None = None, start: Tensor | None = None
) -> Tensor:
    """out [M, N] = x [M, K] w [N, K]ᵀ + u [M, r] v [N, r]ᵀ + bias [N] + start [M, N].

    ``w`` and ``v`` may be transposed views: whichever of their dimensions is contiguous is read
    along it. All share one dtype of float32, float16 or bfloat16; sums are float32.
    """
    (x, w), (u, v) = xw, uv or (None, None)
    (m, k), n = x.shape, w.shape[0]
    bias = None if bias is None else bias.contiguous()
    device = x.device
    chip = common.chip_of(device)
    tile = gemm_tile(chip, m, n, x.element_size())
    out = common.empty((m, n), x.dtype, device)

    w_out, v_out = common.rows_are_out(w), v is None or common.rows_are_out(v)
    w_memory = w if w_out else w.t()
    tma = common.tma_ready(chip, x, w_memory, out)
    block_r = rank_step(1 if u is None else u.shape[1], x.element_size())
    w_block, v_block = (tile.block_n, tile.block_k), (tile.block_n, block_r)
    u_source = v_source = None
    tma_low = False
    if u is not None and v is not None:
        v_memory = v if v_out else v.t()
        tma_low = common.tma_ready(chip, u, v_memory)
        u_source = common.tile_source(u, (tile.block_m, block_r), tma_low)
        v_source = common.tile_source(v_memory, v_block if v_out else v_block[::-1], tma_low)

    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    # A descriptor tile leaves room for one block on a multiprocessor; smaller ones take turns.
    programs = min(tiles, chip.multiprocessors) if tma else tiles
    common.launch(
        _two_phase_kernel,
        programs,
        device,
        common.tile_source(x, (tile.block_m, tile.block_k), tma),
        common.tile_source(w_memory, w_block if w_out else w_block[::-1], tma),
        u_source,
        v_source,
        common.tile_source(out, (tile.block_m, tile.block_n), tma),
        bias,
        start,
        m,
        n,
        k,
        0 if u is None else u.shape[1],
        *x.stride(),
        *w.stride(),
        0 if u is None else u.stride(0),
        0 if v is None else v.stride(0),
        0 if v is None else v.stride(1),
        out.stride(0),
        0 if start is None else start.stride(0),
        0 if start is None else start.stride(1),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_R=block_r,
        W_OUT_ROWS=w_out,
        V_OUT_ROWS=v_out,
        TMA=tma,
        TMA_LOW=tma_low,
        PRECISION=common.precision_of(x.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out.to(x.dtype)
