"""The diagonal of R and what each rank rule makes of it, for plots and for choosing τ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .pivoted_qr import pivoted_qr
from .rules import RANK_RULES, check_rank_options, rank_from_diagonal


@dataclass(frozen=True)
class RankProfile:
    """diagonal [k] (fp64) of R, the thresholds, and for each rule the rank at each threshold."""

    diagonal: Tensor
    taus: tuple[float, ...]
    ranks: dict[str, tuple[int, ...]]


def rank_profile(weight: Tensor, taus: Sequence[float] | None = None) -> RankProfile:
    """Diagonal of the whole pivoted QR of ``weight`` [N, K] and the ranks of the three rules.

    Parameters
    ----------
    taus : sequence of float in (0, 1), optional
        Thresholds; 0.01, 0.02, … 0.99 by default.
    """
    grid = tuple(step / 100 for step in range(1, 100)) if taus is None else tuple(taus)
    for tau in grid:
        check_rank_options(None, tau, "magnitude", None)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    diagonal = pivoted_qr(weight).diagonal
    ranks = {
        rule: tuple(rank_from_diagonal(diagonal, tau, rule) for tau in grid) for rule in RANK_RULES
    }
    return RankProfile(diagonal, grid, ranks)
