"""The second stage of every reduction: sum per-program parts in a fixed order, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common


@triton.jit
def _sum_parts_kernel(parts, out, scaling, P, L, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr):
    """out [L] = scaling · Σ_p parts [P, L]."""
    col = tl.program_id(0) * BLOCK_L
    acc = tl.zeros((BLOCK_P, BLOCK_L), dtype=tl.float32)
    for p in tl.range(0, P, BLOCK_P):
        acc += common.load_tile(parts, p, col, P, L, L, 1, BLOCK_P, BLOCK_L, False)
    total = tl.sum(acc, 0) * tl.cast(scaling, tl.float32)
    cols = col + tl.arange(0, BLOCK_L)
    tl.store(out + cols, total.to(out.dtype.element_ty), mask=cols < L)


def sum_parts(parts: Tensor, scaling: float, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """scaling · Σ_p parts [P, ...] as a tensor of ``shape`` and ``dtype``; parts are float32."""
    out = common.empty(shape, dtype, parts.device)
    length = out.numel()
    block_l = 64
    common.launch(
        _sum_parts_kernel,
        triton.cdiv(length, block_l),
        parts.device,
        parts,
        out,
        scaling,
        parts.shape[0],
        length,
        BLOCK_P=32,
        BLOCK_L=block_l,
        num_warps=4,
    )
    return out.to(dtype)
