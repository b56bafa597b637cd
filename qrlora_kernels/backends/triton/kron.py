"""OHoRA over a frozen linear layer: one pass for the update, and the base product onto it."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import common
from .kron_kernels import _kron_bwd_kernel, _kron_fwd_kernel
from .sums import sum_parts
from .tables import kron_tile
from .two_phase import two_phase


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
    """y [M, N] = x Wᵀ + bias + s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x; a [N/r, r], b [K/r, r]."""
    update = kron_update(x, a, b, a0, b0, scaling)
    if bias is None:
        # The library adds onto the update in its fp32 accumulator and rounds once.
        return update.addmm_(x, weight.t())
    return two_phase(x, weight, bias=bias, start=update)


def kron_update(
    x: Tensor, a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None, scaling: float
) -> Tensor:
    """s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x alone, [M, N] in x's dtype, reading x once."""
    m, (na, r), kb = x.shape[0], a.shape, b.shape[0]
    chip = common.chip_of(x.device)
    block_r, block_n, block_k = _padded(r), _padded(na), _padded(kb)
    tile = kron_tile(chip, block_r, block_n, block_k, x.element_size(), backward=False)
    out = common.empty((m, na * r), x.dtype, x.device)
    chunk = min(block_n, 256)
    common.launch(
        _kron_fwd_kernel,
        min(triton.cdiv(m, tile.tokens), tile.resident * chip.multiprocessors),
        x.device,
        x,
        *_contiguous(a, b, a0, b0),
        out,
        scaling,
        m,
        na,
        kb,
        r,
        *x.stride(),
        out.stride(0),
        BLOCK_T=tile.tokens,
        BLOCK_R=block_r,
        BLOCK_N=chunk,
        BLOCK_K=block_k,
        ONE_CHUNK=chunk == block_n,
        PRECISION=common.precision_of(x.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out.to(x.dtype)


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
    """dx [M, K], da, db from one pass over x and dy; None for what is not asked for."""
    if not (need_dx or need_da or need_db):
        return None, None, None
    m, (na, r), kb = x.shape[0], a.shape, b.shape[0]
    chip = common.chip_of(x.device)
    block_r, block_n, block_k = _padded(r), _padded(na), _padded(kb)
    tile = kron_tile(chip, block_r, block_n, block_k, x.element_size(), backward=True)
    programs = min(triton.cdiv(m, tile.tokens), tile.resident * chip.multiprocessors)
    dx = common.empty((m, kb * r), dy.dtype, dy.device) if need_dx else None

    def parts(need: bool, factor: Tensor) -> Tensor | None:
        shape = (programs, *factor.shape)
        return torch.empty(shape, dtype=torch.float32, device=dy.device) if need else None

    da, db = parts(need_da, a), parts(need_db, b)
    common.launch(
        _kron_bwd_kernel,
        programs,
        dy.device,
        dy,
        x,
        *_contiguous(a, b, a0, b0),
        dx,
        da,
        db,
        scaling,
        m,
        na,
        kb,
        r,
        *dy.stride(),
        *x.stride(),
        0 if dx is None else dx.stride(0),
        BLOCK_T=tile.tokens,
        BLOCK_R=block_r,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PRECISION=common.precision_of(x.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return (
        None if dx is None else dx.to(dy.dtype).addmm_(dy, weight),
        None if da is None else sum_parts(da, scaling, tuple(a.shape), a.dtype),
        None if db is None else sum_parts(db, scaling, tuple(b.shape), b.dtype),
    )


def _padded(size: int) -> int:
    """The power of two that holds ``size``, at least the 16 of a tensor core's step."""
    return max(16, triton.next_power_of_2(size))


def _contiguous(*factors: Tensor | None) -> list[Tensor | None]:
    return [None if factor is None else factor.contiguous() for factor in factors]
