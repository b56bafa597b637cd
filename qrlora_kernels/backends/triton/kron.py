"""OHoRA's update and its gradients, in one pass over the tokens each."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...native import pointers
from ...operands import Kron, KronGradient
from . import common
from .kron_kernels import _kron_bwd_kernel, _kron_fwd_kernel
from .sums import sum_parts
from .tables import Chip, KronTile, fits_one_pass, kron_tile

# Older compilers spill where dA and dB of large factors share a kernel.
_GRADIENTS_TOGETHER = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)


def kron_update(p: Kron) -> Tensor:
    """s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x alone, [M, N] in x's dtype, reading x once."""
    x, a, b = p.x, p.a, p.b
    m, (na, r), kb = x.shape[0], a.shape, b.shape[0]
    chip = common.chip_of(x.device)
    tile = kron_tile(na, kb, r, x.element_size(), chip, backward=False)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = common.empty((m, na * r), x.dtype, x.device)
    x_grid, out_grid = x.unflatten(1, (r, kb)), out.view(m, na, r)
    x_block = (tile.tokens, tile.block_r, tile.block_k)
    out_block = (tile.tokens, tile.block_n, tile.block_r)
    tma = _tma_ready(chip, (x_grid, x_block), (out_grid, out_block))
    common.launch(
        _kron_fwd_kernel,
        min(triton.cdiv(m, tile.tokens), tile.resident * chip.multiprocessors),
        x.device,
        common.tile_source(x_grid, x_block, tma),
        a.contiguous(),
        b.contiguous(),
        *_contiguous(p.a0, p.b0),
        common.tile_source(out_grid, out_block, tma),
        p.scaling,
        m,
        na,
        kb,
        r,
        x.stride(0),
        out.stride(0),
        ONE_CHUNK=tile.block_n >= na,
        **_meta(tile, x.dtype, tma),
    )
    return out.to(x.dtype)


def kron_gradients(p: KronGradient) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The update's share of dx [M, K], da and db; None for what is not asked for.

    One pass over x and dy. Where a factor is so large that its gradient leaves no registers for dx,
    dx takes a pass over dy of its own; so does each gradient where the compiler would spill.
    """
    dy, x = (t if t.stride(1) == 1 else t.contiguous() for t in (p.dy, p.x))
    a, b = p.a.contiguous(), p.b.contiguous()
    a0, b0 = _contiguous(p.a0, p.b0)
    p = p._replace(dy=dy, x=x, a=a, b=b, a0=a0, b0=b0)
    dx = common.empty(tuple(x.shape), x.dtype, x.device) if p.need_dx else None
    if fits_one_pass(a.shape[0], b.shape[0], a.shape[1], common.chip_of(x.device)):
        da, db = _backward_pass(p, dx)
    else:
        if _GRADIENTS_TOGETHER:
            da, db = _backward_pass(p, None)
        else:
            da, _ = _backward_pass(p._replace(need_db=False), None)
            _, db = _backward_pass(p._replace(need_da=False), None)
        _backward_pass(p._replace(need_da=False, need_db=False), dx)
    return None if dx is None else dx.to(dy.dtype), da, db


def _backward_pass(p: KronGradient, dx: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Fill ``dx`` with the update's share, if given; return da and db, if asked for."""
    dy, x, a, b = p.dy, p.x, p.a, p.b
    if dx is None and not (p.need_da or p.need_db):
        return None, None
    m, (na, r), kb = x.shape[0], a.shape, b.shape[0]
    chip = common.chip_of(x.device)
    tile = kron_tile(na, kb, r, x.element_size(), chip, backward=True)
    programs = min(triton.cdiv(m, tile.tokens), tile.resident * chip.multiprocessors)
    parts = [
        torch.empty((programs, *factor.shape), dtype=torch.float32, device=x.device)
        if need
        else None
        for need, factor in ((p.need_da, a), (p.need_db, b))
    ]
    dy_grid, x_grid = dy.unflatten(1, (na, r)), x.unflatten(1, (r, kb))
    dx_grid = None if dx is None else dx.view(m, r, kb)
    dy_block = (tile.tokens, tile.block_n, tile.block_r)
    x_block = (tile.tokens, tile.block_r, tile.block_k)
    tma = _tma_ready(chip, (dy_grid, dy_block), (x_grid, x_block), (dx_grid, x_block))
    common.launch(
        _kron_bwd_kernel,
        programs,
        x.device,
        common.tile_source(dy_grid, dy_block, tma),
        common.tile_source(x_grid, x_block, tma),
        *(a, b, p.a0, p.b0),
        None if dx_grid is None else common.tile_source(dx_grid, x_block, tma),
        *parts,
        p.scaling,
        m,
        na,
        kb,
        r,
        dy.stride(0),
        x.stride(0),
        0 if dx is None else dx.stride(0),
        **_meta(tile, x.dtype, tma),
    )
    da, db = (
        None if part is None else sum_parts(part, p.scaling, tuple(factor.shape), factor.dtype)
        for part, factor in zip(parts, (a, b), strict=True)
    )
    return da, db


def _meta(tile: KronTile, dtype: torch.dtype, tma: bool) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "BLOCK_T": tile.tokens,
        "BLOCK_R": tile.block_r,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "TMA": tma,
        "DTYPE": common.tl_dtype(dtype),
        "PRECISION": common.precision_of(dtype),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _tma_ready(chip: Chip, *grids: tuple[Tensor | None, tuple[int, ...]]) -> bool:
    """Whether each [M, rows, columns] view and its block suit a tensor descriptor."""
    return chip.has_tma and all(
        t.numel() > 0
        and max(block) <= 256
        and pointers.is_aligned(t, 16)
        and all(stride * t.element_size() % 16 == 0 for stride in t.stride()[:2])
        for t, block in grids
        if t is not None
    )


def _contiguous(a0: Tensor | None, b0: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if a0 is None or b0 is None:
        return None, None
    return a0.contiguous(), b0.contiguous()
