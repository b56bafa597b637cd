"""How many pivots of each matrix of a list, and which: the core or torch operations find them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu_core, cuda_core
from .blocked import Pivots, greedy_pivots
from .cpu_core import Factors
from .panels import column_norms2
from .rules import RankRule, rank_bracket, rank_from_diagonal

Report = Callable[[int], None]


@dataclass(frozen=True)
class RankOptions:
    """What decides the rank; see :func:`pivoted_qr`."""

    rank: int | None
    tau: float | None
    rank_rule: RankRule
    max_rank: int | None
    exact: bool

    def cap(self, weight: Tensor) -> int:
        """The rank can not exceed this."""
        return min(self.max_rank or min(weight.shape), min(weight.shape))

    def limit(self, weight: Tensor) -> int:
        """Pivots that may be needed to know the rank."""
        if self.tau is None:
            return min(self.rank or self.cap(weight), self.cap(weight))
        return self.cap(weight) if self.rank_rule == "magnitude" else min(weight.shape)

    def stop_rule(self) -> RankRule | None:
        """The rule that may end the search before ``limit``."""
        if self.tau is None or (self.exact and self.rank_rule != "magnitude"):
            return None
        return self.rank_rule


class Chosen(NamedTuple):
    """pivots [r], and whether the matrix ran out of columns; bracket of an inexact rule; factors
    where the search has them already."""

    pivots: Tensor
    deficient: bool
    bracket: tuple[int, int] | None
    factors: Factors | None


def after(before: int, report: Report) -> Report:
    """``report`` for a part of a list of which ``before`` are done already."""
    return lambda done: report(before + done)


def choose_pivots(
    named: Sequence[tuple[str, Tensor]],
    options: RankOptions,
    dtypes: Sequence[torch.dtype],
    report: Report,
) -> list[Chosen]:
    """Pivots that each matrix keeps; ``dtypes`` are those of its factors.

    Raises
    ------
    ValueError
        A matrix is zero or has a NaN or Inf.
    """
    limits = [options.limit(weight) for _, weight in named]
    found = _search_gpu(named, limits, options, report)
    factors: dict[int, Factors] = {}
    native = [
        i for i, (_, weight) in enumerate(named) if i not in found and cpu_core.handles(weight)
    ]
    searched = _search_native(
        [named[i][1] for i in native],
        [limits[i] for i in native],
        [dtypes[i] for i in native],
        options,
        after(len(found), report),
    )
    for i, (pivots, made) in zip(native, searched, strict=True):
        name, weight = named[i]
        found[i] = _searched(name, pivots)
        size = len(found[i].columns)
        if made is not None and _are_final(weight, limits[i], size, options.stop_rule()):
            factors[i] = made
    for i, (name, weight) in enumerate(named):
        if i not in found:
            found[i] = _searched(name, _search_torch(weight, options))
            report(len(found))
    return [_cut(found[i], weight, options, factors.get(i)) for i, (_, weight) in enumerate(named)]


def _search_native(
    weights: Sequence[Tensor],
    limits: Sequence[int],
    dtypes: Sequence[torch.dtype],
    options: RankOptions,
    report: Report,
) -> Sequence[tuple[Pivots | None, Factors | None]]:
    """Pivots on the CPU core, with the factors where the rank is the number of pivots."""
    if not weights:
        return []
    rule, tau = options.stop_rule(), options.tau
    most = options.max_rank or max(min(weight.shape) for weight in weights)
    cut_later = tau is not None and rule != "magnitude"
    return cpu_core.search(
        weights, limits, rule, tau or 0.0, most, None if cut_later else dtypes, report
    )


def _are_final(weight: Tensor, limit: int, rank: int, rule: RankRule | None) -> bool:
    """The factors of a search for ``limit`` pivots are those of a search for the ``rank`` it found.

    A deficient matrix may have so few that they would be found in another way; with a rule the
    search begins like one for few pivots, whatever its limit.
    """
    begun = rule is None and cpu_core.keeps_residual(weight, limit)
    return begun == cpu_core.keeps_residual(weight, rank)


def _searched(name: str, pivots: Pivots | None) -> Pivots:
    if pivots is None:
        raise ValueError(f"{name} must be finite, got NaN or Inf")
    if len(pivots.columns) == 0:
        raise ValueError(f"{name} must not be zero, got a matrix of norm 0")
    return pivots


def _search_gpu(
    named: Sequence[tuple[str, Tensor]],
    limits: Sequence[int],
    options: RankOptions,
    report: Report,
) -> dict[int, Pivots]:
    """Pivots of those matrices of the list that the CUDA core takes."""
    rule = options.stop_rule()
    members = [i for i, (_, weight) in enumerate(named) if cuda_core.handles(weight, rule)[0]]
    results = cuda_core.search(
        [named[i][1] for i in members],
        [limits[i] for i in members],
        options.tau if rule == "magnitude" else None,
        report,
    )
    return {i: _searched(named[i][0], pivots) for i, pivots in zip(members, results, strict=True)}


def _search_torch(weight: Tensor, options: RankOptions) -> Pivots | None:
    norms2 = column_norms2(weight)
    if not bool(torch.isfinite(norms2).all()):
        return None
    rule, tau = options.stop_rule(), options.tau
    stop = None
    if rule in ("energy", "abs_sum"):

        def stop(norms: Tensor, bounds: Tensor) -> bool:
            low, high = _bracket(norms, bounds, weight, options)
            return high is not None or low >= options.cap(weight)

    return greedy_pivots(
        weight,
        options.limit(weight),
        tau=tau if rule == "magnitude" else None,
        stop=stop,
        norms2=norms2,
    )


def _cut(found: Pivots, weight: Tensor, options: RankOptions, factors: Factors | None) -> Chosen:
    """The pivots that the rank rule keeps; there are factors only where no rule cuts."""
    rank, cap, bracket = len(found.columns), options.cap(weight), None
    if options.tau is not None and options.rank_rule != "magnitude":
        if options.exact:
            rank = min(rank_from_diagonal(found.norms, options.tau, options.rank_rule), cap)
        else:
            low, high = _bracket(found.norms, found.bounds, weight, options)
            low = min(low, cap)
            rank = low if high is None else min(high, cap)
            bracket = (low, rank)
    deficient = found.deficient and rank == len(found.columns)
    return Chosen(found.columns[:rank], deficient, bracket, factors)


def _bracket(
    norms: Tensor, bounds: Tensor, weight: Tensor, options: RankOptions
) -> tuple[int, int | None]:
    assert options.tau is not None
    return rank_bracket(norms, bounds.sqrt(), min(weight.shape), options.tau, options.rank_rule)
