"""Updates as pairs of matrices in the file's dtype: exact up to one rounding, or truncated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..autocast import outside_autocast
from ..linalg import truncated_svd
from ..reference import HALF
from .beside import TO_MERGED
from .records import Update

DTYPES = (torch.float32, *HALF)
ROUNDING = 2.0**-7  # of a matrix, in the norm: more than any half precision rounds in its range


class Pair(NamedTuple):
    """ΔW = b a, with a [r, K] and b [N, r]."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return len(self.a)


def check_dtype(dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be None or one of {list(DTYPES)}, got {dtype!r}")
    return dtype


@torch.no_grad()
def pairs_of(
    updates: dict[str, Update], truncate: int | None, dtype: torch.dtype
) -> tuple[dict[str, Pair], dict[str, float]]:
    """The pair of each layer, and ‖ΔW − b a‖ / ‖ΔW‖ of those that were cut down.

    Raises
    ------
    ValueError
        If an update is not finite, not of low rank while ``truncate`` is None, or out of the range
        of ``dtype``; the message names the layer.
    """
    pairs, errors = {}, {}
    for name, update in updates.items():
        pair, error = _pair(name, update, truncate)
        if error is not None:
            errors[name] = error
        pairs[name] = _without_silent(_rounded(name, pair, dtype))
    return pairs, errors


def _pair(name: str, update: Update, truncate: int | None) -> tuple[Pair, float | None]:
    try:
        pair = Pair(*update.factors())
    except TypeError:
        if truncate is None:
            raise ValueError(
                f"{name} has an update of OHoRA, which is of full rank and no exact LoRA: "
                f"{TO_MERGED}, or give truncate=R for its best R directions"
            ) from None
        return _truncated(name, update.delta(), truncate)
    if truncate is None or pair.rank <= truncate:
        return pair, None
    return _truncated(name, update.delta(), truncate)


def _truncated(name: str, delta: Tensor, rank: int) -> tuple[Pair, float]:
    """The closest pair of ``rank``, or of less where ΔW has no more rows or columns."""
    rank, norm = min(rank, *delta.shape), float(delta.norm())
    if norm == 0.0:
        return Pair(delta.new_zeros(rank, delta.shape[1]), delta.new_zeros(len(delta), rank)), 0.0
    if not torch.isfinite(delta).all():
        raise ValueError(_not_finite(name))
    (found,) = truncated_svd({name: delta}, rank)
    pair = Pair(found.vh, found.u * found.s)
    with outside_autocast(delta.device.type):
        return pair, float((delta - pair.b @ pair.a).norm()) / norm


def _rounded(name: str, pair: Pair, dtype: torch.dtype) -> Pair:
    """On the CPU, in ``dtype``."""
    if not all(bool(torch.isfinite(t).all()) for t in pair):
        raise ValueError(_not_finite(name))
    rounded = Pair(*(t.detach().to("cpu", dtype, copy=True).contiguous() for t in pair))
    for wide, narrow in zip(pair, rounded, strict=True):
        error = (narrow.to(wide.dtype) - wide.cpu()).norm()
        if not error <= ROUNDING * wide.norm().cpu():
            raise ValueError(
                f"dtype must hold the numbers of {name}, and they are out of the range of {dtype}: "
                "take torch.float32"
            )
    return rounded


def _not_finite(name: str) -> str:
    return f"{name} must have a finite update to be exported, got NaN or infinite numbers"


def _without_silent(pair: Pair) -> Pair:
    """Without directions that are exactly zero (λ = 0); one stays where all are."""
    live = pair.a.any(dim=1) & pair.b.any(dim=0)
    if not live.any():
        live[0] = True
    return Pair(pair.a[live].contiguous(), pair.b[:, live].contiguous())


def padded(pair: Pair, rank: int) -> Pair:
    """With zero rows and columns up to ``rank``."""
    more = rank - pair.rank
    a = torch.cat([pair.a, pair.a.new_zeros(more, pair.a.shape[1])])
    return Pair(a, torch.cat([pair.b, pair.b.new_zeros(len(pair.b), more)], dim=1))
