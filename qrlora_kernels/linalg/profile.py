"""The diagonal of R and what each rank rule makes of it, for plots and for choosing τ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .pivoted_qr import pivoted_qr
from .rules import RANK_RULES, check_rank_options, rank_from_diagonal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 9  # thresholds that the printed table has rows for


@dataclass(frozen=True, repr=False)
class RankProfile:
    """Ranks of the three rules for one weight; prints as a table of at most twelve lines.

    Attributes
    ----------
    diagonal : Tensor [k] fp64
        R_ii of the whole pivoted QR, k ≤ min(N, K).
    taus : tuple of float
        The thresholds.
    ranks : dict
        For each rule its rank at each threshold.
    shape : (int, int)
        N and K of the weight.
    dtype : torch.dtype
        The weight's, in which a layer keeps its factors unless told otherwise.
    """

    diagonal: Tensor
    taus: tuple[float, ...]
    ranks: dict[str, tuple[int, ...]]
    shape: tuple[int, int]
    dtype: torch.dtype

    def factor_bytes(self, rank: int) -> int:
        """Bytes of Q [N, rank] and R̃ [rank, K] in the weight's dtype."""
        return rank * sum(self.shape) * self.dtype.itemsize

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        magnitudes = self.diagonal.abs()
        lines = [
            f"weight {list(self.shape)} {dtype}, {_kib(self.dtype.itemsize * prod(self.shape))} "
            f"KiB; |R_ii| from {magnitudes[0]:.3g} to {magnitudes[-1]:.3g}",
            f"by each rule: rank, share of {min(self.shape)}, KiB of factors",
            "   tau" + "".join(f"  {rule:>22s}" for rule in self.ranks),
        ]
        for i in _spread(len(self.taus)):
            cells = (self._cell(ranks[i]) for ranks in self.ranks.values())
            lines.append(f"{self.taus[i]:6.4g}" + "".join(f"  {cell:>22s}" for cell in cells))
        return "\n".join(lines)

    def _cell(self, rank: int) -> str:
        share = rank / min(self.shape)
        return f"{rank:5d} {share:5.0%} {_kib(self.factor_bytes(rank)):>10s}"

    def plot(self) -> Figure:
        """Two pictures: \\|R_ii\\| / \\|R_11\\| over i, and the rank of each rule over τ.

        Returns
        -------
        matplotlib.figure.Figure
            Of pyplot: ``pyplot.show()`` shows it.

        Raises
        ------
        ImportError
            Where matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError(
                "plot() needs matplotlib, which is not installed: pip install matplotlib"
            ) from error
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        magnitudes = self.diagonal.abs()
        left.plot(range(1, 1 + len(magnitudes)), (magnitudes / magnitudes[0]).tolist())
        left.set(yscale="log", xlabel="i", ylabel="|R_ii| / |R_11|")
        for rule, ranks in self.ranks.items():
            right.plot(*zip(*sorted(zip(self.taus, ranks, strict=True)), strict=True), label=rule)
        right.set(xlabel="τ", ylabel="rank", ylim=(0, 1.02 * min(self.shape)))
        right.legend()
        return figure


def rank_profile(weight: Tensor, taus: Sequence[float] | None = None) -> RankProfile:
    """Diagonal of the whole pivoted QR of ``weight`` [N, K] and the ranks of the three rules.

    Parameters
    ----------
    taus : sequence of float in (0, 1), optional
        Thresholds; 0.01, 0.02, … 0.99 by default.
    """
    grid = tuple(step / 100 for step in range(1, 100)) if taus is None else tuple(taus)
    if not grid:
        raise ValueError("taus must hold at least one threshold, got none")
    for tau in grid:
        check_rank_options(None, tau, "magnitude", None)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    diagonal = pivoted_qr(weight).diagonal
    ranks = {
        rule: tuple(rank_from_diagonal(diagonal, tau, rule) for tau in grid) for rule in RANK_RULES
    }
    return RankProfile(diagonal, grid, ranks, (weight.shape[0], weight.shape[1]), weight.dtype)


def _kib(size: int) -> str:
    return f"{size / 2**10:,.1f}"


def _spread(count: int) -> Sequence[int]:
    """Positions of at most ``_SHOWN`` of so many, evenly apart: the tenths of 0.01 … 0.99."""
    if count <= _SHOWN:
        return range(count)
    return [round((count + 1) * i / (_SHOWN + 1)) - 1 for i in range(1, _SHOWN + 1)]
