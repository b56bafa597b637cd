"""Launch the skinny products: h and the gated operand forward, g, its gated form and the gate's
gradient backward, each in one pass over the tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...operands import LowRank, LowRankGradient
from ...reference import hidden_dtype
from . import common
from .skinny_kernels import _finish_kernel, _project_kernel
from .sums import sum_parts
from .tables import DECODE_TOKENS, Chip, ProjectTile, project_tile, rank_widths

# Up to this reduction, one more launch costs more than the shorter walk saves.
_DECODE_SPLIT_FROM = 8192


def low_rank_in(p: LowRank) -> tuple[Tensor, Tensor]:
    """h [M, r] = x downᵀ, and the operand s·h∘λ or s·h C [M, r] in x's dtype."""
    assert p.down is not None
    x, gate = p.x, p.gate.contiguous()
    m, r = x.shape[0], gate.shape[-1]
    hidden = hidden_dtype(x.dtype)
    h = common.empty((m, r), hidden, x.device)
    scaled = common.empty_rows(m, r, x.dtype, x.device)
    _run(Skinny(x, p.down, gate, p.scaling, h, scaled, need_grad=False, backward=False))
    return h.to(hidden), _narrow(scaled, x.dtype)


def low_rank_back(p: LowRankGradient) -> tuple[Tensor | None, Tensor | None]:
    """s·g∘λ or s·g Cᵀ [M, r] with g = dy up, and s·Σ_m h∘g or s·hᵀ g.

    Each is None where it is not asked for; the gradient has the gate's shape and dtype.
    """
    dy, gate = p.dy, p.gate.contiguous()
    m, r = dy.shape[0], gate.shape[-1]
    scaled = common.empty_rows(m, r, dy.dtype, dy.device) if p.need_dx else None
    proj, h = p.up.t(), p.h.contiguous()
    parts = _run(Skinny(dy, proj, gate, p.scaling, h, scaled, p.need_dgate, backward=True))
    grad = None if parts is None else sum_parts(parts, p.scaling, tuple(gate.shape), gate.dtype)
    return None if scaled is None else _narrow(scaled, dy.dtype), grad


def _narrow(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows.to(dtype)`` with the rows still on 16 bytes."""
    if rows.dtype == dtype:
        return rows
    out = torch.empty((rows.shape[0], rows.stride(0)), dtype=dtype, device=rows.device)
    return out[:, : rows.shape[1]].copy_(rows)


def _splits(chip: Chip, tile: ProjectTile, tiles: int, k: int) -> int:
    """Parts of the reduction that bring the programs to two a multiprocessor."""
    steps = triton.cdiv(k, tile.block_k)
    return max(1, min(2 * chip.multiprocessors // max(tiles, 1), steps // 4))


class Skinny(NamedTuple):
    """What a pass reads and writes: rows [M, K] projᵀ [K, r], and what follows it."""

    rows: Tensor
    proj: Tensor  # [r, K]
    gate: Tensor
    scaling: float
    saved: Tensor  # h: written forward, read backward
    scaled: Tensor | None
    need_grad: bool
    backward: bool


def _run(p: Skinny) -> Tensor | None:
    """Product and finish, in one kernel where the tokens fill the GPU; the gradient's parts."""
    x, proj, gate, scaling, saved, scaled, need_grad, backward = p
    (m, k), r = x.shape, proj.shape[0]
    chip = common.chip_of(x.device)
    tile = project_tile(chip, m, r, x.element_size())
    core = gate.ndim == 2
    decode = m <= DECODE_TOKENS
    # Few tokens: the projection is what is read, so the programs share out its rows.
    widths = (16, 0) if decode else rank_widths(r)
    rank_tiles = triton.cdiv(r, sum(widths))
    tiles = triton.cdiv(m, tile.block_m) * rank_tiles
    whole_row_missing = core and rank_tiles > 1
    splits = 1
    if whole_row_missing or not decode or k > _DECODE_SPLIT_FROM:
        splits = _splits(chip, tile, tiles, k)
    apart = splits > 1 or whole_row_missing

    finish_rows = tile.block_m
    if apart:
        finish_rows = 16 if m <= 256 else 64 if core and r <= 128 else 32
    finish_tiles = triton.cdiv(m, finish_rows)
    grad = None
    if need_grad:
        grad = torch.empty((finish_tiles, *gate.shape), dtype=torch.float32, device=x.device)
    partial = None
    if apart:
        partial = torch.empty((splits, m, r), dtype=torch.float32, device=x.device)
    finish_meta = {
        "BLOCK_J": 32 if max(rank_widths(r)) > 64 else 64 if r > 32 else 16,
        "CORE": core,
        "BACKWARD": backward,
        "PRECISION": common.precision_of(x.dtype),
    }

    out_rows = common.rows_are_out(proj)
    memory = proj if out_rows else proj.t()
    tma_x, tma_b = common.tma_ready(chip, x), common.tma_ready(chip, memory)
    blocks = [(width or 16, tile.block_k) for width in widths]
    sources = [
        common.tile_source(memory, block if out_rows else block[::-1], tma_b) for block in blocks
    ]
    shared = partial, saved, scaled, gate, grad, scaling, m
    span = triton.cdiv(triton.cdiv(k, tile.block_k), splits) * tile.block_k
    scaled_stride = 0 if scaled is None else scaled.stride(0)
    common.launch(
        _project_kernel,
        tiles * splits,
        x.device,
        common.tile_source(x, (tile.block_m, tile.block_k), tma_x),
        *sources,
        *shared,
        k,
        r,
        span,
        splits,
        *x.stride(),
        *proj.stride(),
        saved.stride(0),
        scaled_stride,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        BLOCK_R0=widths[0],
        BLOCK_R1=widths[1],
        B_OUT_ROWS=out_rows,
        TMA_X=tma_x,
        TMA_B=tma_b,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **finish_meta,
    )
    if apart:
        widths = rank_widths(r)
        common.launch(
            _finish_kernel,
            finish_tiles * triton.cdiv(r, sum(widths)),
            x.device,
            *shared,
            r,
            splits,
            saved.stride(0),
            scaled_stride,
            BLOCK_M=finish_rows,
            BLOCK_R0=widths[0],
            BLOCK_R1=widths[1],
            num_warps=4 if r <= 192 else 8,
            num_stages=1,
            **finish_meta,
        )
    return grad
