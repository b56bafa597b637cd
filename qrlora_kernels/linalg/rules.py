"""Rank rules of QR-LoRA (arXiv 2508.21810): how many pivots to keep, read off the diagonal of R."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .checks import check_choice
from .exponents import in_range, times_two_to

RankRule = Literal["magnitude", "energy", "abs_sum"]
RANK_RULES: tuple[str, ...] = get_args(RankRule)


def check_rank_options(
    rank: int | None, tau: float | None, rank_rule: str, max_rank: int | None
) -> None:
    """Refuse options that cannot mean anything for any matrix.

    Raises
    ------
    TypeError
        ``rank`` or ``max_rank`` is not an int, ``tau`` not a number.
    ValueError
        ``rank`` or ``max_rank`` below 1, ``tau`` outside (0, 1), both ``rank`` and ``tau`` given,
        or an unknown ``rank_rule``.
    """
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if tau is not None:
        if isinstance(tau, bool) or not isinstance(tau, (int, float)):
            raise TypeError(f"tau must be a float, got {type(tau).__name__} {tau!r}")
        if not 0.0 < tau < 1.0:
            raise ValueError(f"tau must lie strictly between 0 and 1, got {tau}")
        if rank is not None:
            raise ValueError(f"give rank or tau, not both: got rank={rank} and tau={tau}")
    check_choice("rank_rule", rank_rule, RANK_RULES)


def magnitude_rank(diagonal: Tensor, tau: float) -> int:
    """Count of \\|R_ii\\| > τ \\|R_11\\| (paper section 4.1)."""
    magnitude = diagonal.abs()
    return int((magnitude > tau * magnitude[0]).sum())


def energy_rank(diagonal: Tensor, tau: float) -> int:
    """Smallest r with Σ_{i≤r} R_ii² ≥ τ Σ R_ii² (paper eq. 4); needs the whole diagonal."""
    scaled, _ = in_range("diagonal", diagonal.double())
    return _first_reaching(scaled**2, tau)


def abs_sum_rank(diagonal: Tensor, tau: float) -> int:
    """Smallest r with Σ_{i≤r} \\|R_ii\\| ≥ τ Σ \\|R_ii\\| (paper section 2.2)."""
    scaled, _ = in_range("diagonal", diagonal.double())
    return _first_reaching(scaled.abs(), tau)


def rank_from_diagonal(diagonal: Tensor, tau: float, rank_rule: str) -> int:
    """Rank that ``rank_rule`` gives for a diagonal of R [k], k ≥ 1, in pivot order."""
    rules = {"magnitude": magnitude_rank, "energy": energy_rank, "abs_sum": abs_sum_rank}
    return rules[rank_rule](diagonal, tau)


def rank_bracket(
    diagonal: Tensor, residual_norms: Tensor, max_terms: int, tau: float, rank_rule: str
) -> tuple[int, int | None]:
    """Certified bounds of the energy or abs-sum rank from a factorisation stopped after k pivots.

    The diagonal still to come is positive, starts at the largest residual column norm and, since
    every later \\|R_ii\\| is the norm of a different column that has shrunk further, sums to at
    most the sum over the largest ``max_terms - k`` residual norms.

    Parameters
    ----------
    diagonal : Tensor [k]
        Known part of the diagonal.
    residual_norms : Tensor [K]
        Norms (not squared), or upper bounds, of the columns after k pivots; 0 at the pivots.
    max_terms : int
        min(N, K), the length of the whole diagonal.

    Returns
    -------
    (low, high)
        low ≤ r ≤ high; ``high`` is None while k pivots do not bound r from above.
    """
    power = 2 if rank_rule == "energy" else 1
    scaled, exponent = in_range("diagonal", diagonal.double())
    known = scaled.abs() ** power
    cumulative = known.cumsum(0)
    left = max(max_terms - len(known), 0)
    residual = times_two_to(-exponent, residual_norms.double())
    tail = (residual**power).topk(min(left, len(residual_norms))).values
    at_least = float(cumulative[-1]) + (float(tail[0]) if len(tail) else 0.0)
    at_most = float(cumulative[-1]) + float(tail.sum())
    # A relative 1e-12 covers the rounding of both sums.
    low = int(torch.searchsorted(cumulative, tau * at_least * (1 - 1e-12))) + 1
    high = int(torch.searchsorted(cumulative, tau * at_most * (1 + 1e-12))) + 1
    return low, high if high <= len(known) else None


def _first_reaching(terms: Tensor, tau: float) -> int:
    cumulative = terms.cumsum(0)
    position = int(torch.searchsorted(cumulative, tau * cumulative[-1]))
    return min(position + 1, len(terms))
