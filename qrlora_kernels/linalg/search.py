"""How many pivots of each matrix of a list, and which: the core or torch operations find them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from . import cpu_core, cuda_core
from .blocked import greedy_pivots
from .jobs import Factors, Job, Pivots, Report, after
from .rules import RankRule, rank_bracket, rank_from_diagonal


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


def choose_pivots(jobs: Sequence[Job], options: RankOptions, report: Report) -> list[Chosen]:
    """Pivots that each matrix keeps.

    Raises
    ------
    ValueError
        A matrix is zero or has a NaN or Inf.
    """
    rule, tau = options.stop_rule(), options.tau
    on_gpu = [i for i, job in enumerate(jobs) if cuda_core.handles(job.weight, rule)[0]]
    results = cuda_core.search(
        [jobs[i] for i in on_gpu], tau if rule == "magnitude" else None, report
    )
    found = {i: _searched(jobs[i], pivots) for i, pivots in zip(on_gpu, results, strict=True)}
    factors: dict[int, Factors] = {}
    native = [i for i, job in enumerate(jobs) if i not in found and cpu_core.handles(job.weight)]
    searched = cpu_core.search(
        [jobs[i] for i in native],
        after(len(found), report),
        rule,
        tau or 0.0,
        options.max_rank or max((min(jobs[i].weight.shape) for i in native), default=1),
        factors=tau is None or rule == "magnitude",  # others cut what was found
    )
    for i, (pivots, made) in zip(native, searched, strict=True):
        found[i] = _searched(jobs[i], pivots)
        if made is not None and _are_final(jobs[i], len(found[i].columns), rule):
            factors[i] = made
    for i, job in enumerate(jobs):
        if i not in found:
            found[i] = _searched(job, _search_torch(job, options))
            report(len(found))
    return [_cut(found[i], job.weight, options, factors.get(i)) for i, job in enumerate(jobs)]


def _are_final(job: Job, rank: int, rule: RankRule | None) -> bool:
    """The factors of a search to the job's limit are those of a search for the ``rank`` it found.

    A deficient matrix may have so few that they would be found in another way; with a rule the
    search begins like one for few pivots, whatever its limit.
    """
    begun = rule is None and cpu_core.keeps_residual(job.weight, job.limit)
    return begun == cpu_core.keeps_residual(job.weight, rank)


def _searched(job: Job, pivots: Pivots | None) -> Pivots:
    if pivots is None:
        raise ValueError(f"{job.name} must be finite, got NaN or Inf")
    if len(pivots.columns) == 0:
        raise ValueError(f"{job.name} must not be zero, got a matrix of norm 0")
    return pivots


def _search_torch(job: Job, options: RankOptions) -> Pivots:
    rule, stop = options.stop_rule(), None
    if rule in ("energy", "abs_sum"):

        def stop(norms: Tensor, bounds: Tensor) -> bool:
            low, high = _bracket(norms, bounds, job.weight, options)
            return high is not None or low >= options.cap(job.weight)

    tau = options.tau if rule == "magnitude" else None
    return greedy_pivots(job.weight, job.limit, tau, stop)


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
