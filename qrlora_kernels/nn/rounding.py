"""Rounding that keeps small updates: what is lost in one element is kept in the mean of many."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import HALF

# Not a seed that anyone draws weights with: the same stream for both would correlate the rounding
# with the weights (with seed 0 for both, a merge doubled its update).
_SEED = 1_618_033_988


def round_unbiased(values: Tensor, dtype: torch.dtype, seed: int = _SEED) -> Tensor:
    """``values`` in ``dtype``; to half precision by rounding up or down at random, without bias.

    Each value goes to one of its two neighbours in ``dtype`` with the probability that makes the
    expectation exact; a representable value stays as it is. Round-to-nearest would drop nearly all
    of an update far below the last bit of the weight it is added to. The random numbers come from
    ``seed`` alone, so the same values give the same bits.

    Parameters
    ----------
    values : Tensor of fp32 or fp64
    dtype : torch.dtype
        fp16 and bf16 are rounded at random, others to nearest.
    seed : int
    """
    near = values.to(dtype)
    if dtype not in HALF:
        return near
    error = values - near.to(values.dtype)
    # The bits of a half-precision number order its magnitudes, so a neighbour is one step away.
    bits = near.view(torch.int16)
    outward = (error > 0) == (near > 0)
    step = torch.where(outward, 1, -1).to(torch.int16)
    other = (bits + step).view(dtype)
    smallest = torch.ones_like(bits).view(dtype)
    other = torch.where(near == 0, torch.where(error < 0, -smallest, smallest), other)
    gap = (other.to(values.dtype) - near.to(values.dtype)).abs()
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(values.shape, generator=generator, dtype=torch.float32, device="cpu").to(
        values.device
    )
    moves = (error != 0) & torch.isfinite(other) & (draw * gap < error.abs())
    return torch.where(moves, other, near)
