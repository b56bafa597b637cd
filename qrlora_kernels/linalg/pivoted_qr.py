"""Batched, truncated, column-pivoted QR: the start of QR-LoRA (arXiv 2508.21810)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from .checks import Named, check_out_dtype, check_rank_fits, named_matrices
from .exponents import check_held, in_range, is_held, times_two_to
from .factorisation import factorisation, start_computation
from .from_pivots import from_pivots
from .jobs import Job, after
from .rules import RankRule, check_rank_options
from .search import Chosen, RankOptions, choose_pivots


@dataclass(frozen=True)
class PivotedQR:
    """Rank-r factors of W [N, K]: W ≈ q r, with equality at r = rank(W).

    Attributes
    ----------
    q : Tensor [N, r]
        Orthonormal columns.
    r : Tensor [r, K]
        R with the permutation undone: columns in the order of W's. r[i, pivots[i]] > 0, and
        r[j, pivots[i]] = 0 for j > i.
    pivots : Tensor [r] int64
        Columns of W in the order in which they were taken.
    diagonal : Tensor [r] fp64
        r at the pivots, positive and non-increasing up to rounding.
    rank : int
        r.
    deficient : bool
        The matrix ran out of independent columns at r.
    bracket : (int, int) or None
        With ``exact=False``: certified bounds of the exact rule's rank; ``rank`` is the upper one.
    """

    q: Tensor
    r: Tensor
    pivots: Tensor
    diagonal: Tensor
    rank: int
    deficient: bool = False
    bracket: tuple[int, int] | None = None


@factorisation
def pivoted_qr(
    weights: Named,
    rank: int | None = None,
    tau: float | None = None,
    rank_rule: RankRule = "magnitude",
    max_rank: int | None = None,
    exact: bool = True,
    axis: int = 1,
    out_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> list[PivotedQR]:
    """Column-pivoted QR of a matrix or a list of matrices, stopped at the rank that is wanted.

    The pivots are the greedy ones of LAPACK's geqp3 for the same values in fp64. Ties (norms²
    within a relative 1e-13) go to the lowest column index. Results do not depend on the other
    matrices of a list. Inputs are not modified, and not copied whole up to min(N, K) / 5 pivots;
    for more, and for rules that need the whole diagonal, the CPU core keeps a residual in fp64.

    Parameters
    ----------
    weights : Tensor [N, K], or sequence of them or mapping from the names that errors use
        bf16, fp16, fp32 or fp64, any strides, shapes and dtypes mixed.
    rank : int, optional
        Number of pivots. Without ``rank`` and ``tau``: min(N, K).
    tau : float in (0, 1), optional
        Threshold of ``rank_rule``.
    rank_rule : {"magnitude", "energy", "abs_sum"}
        How ``tau`` gives the rank, see :mod:`qrlora_kernels.linalg.rules`. "magnitude" stops early;
        the others need the whole diagonal.
    max_rank : int, optional
        Upper limit of the rank a rule may give.
    exact : bool
        False, for "energy" and "abs_sum": stop as soon as the rank is bracketed (or known to be
        beyond ``max_rank``) and take the upper end; ``bracket`` holds both.
    axis : int
        Dimension that is pivoted: 1 (columns), or 0 to factorise the transpose.
    out_dtype : torch.dtype, optional
        dtype of q and r; the weight's by default, and fp32 where fp16 cannot hold r (a column norm
        above 65,504).
    progress : bool
        Show a progress bar over the list.

    Returns
    -------
    PivotedQR, or a list of them for a sequence or a mapping

    Raises
    ------
    TypeError, ValueError
        Name the argument, and which matrix of the list: not a floating 2-D matrix, NaN or Inf, all
        zero, ``rank`` beyond min(N, K), ``tau`` outside (0, 1), an r that its dtype cannot hold.
    """
    check_rank_options(rank, tau, rank_rule, max_rank)
    check_out_dtype(out_dtype)
    if axis not in (-2, -1, 0, 1):
        raise ValueError(f"axis must be 0 or 1, got {axis!r}")
    options = RankOptions(rank, tau, rank_rule, max_rank, exact)
    jobs, exponents = [], []
    for name, weight in weights.items():
        if axis in (-2, 0):
            weight = weight.mT
        if rank is not None:
            check_rank_fits(name, rank, weight)
        weight, exponent = in_range(name, weight)
        jobs.append(Job(name, weight, options.limit(weight), out_dtype or weight.dtype))
        exponents.append(exponent)
    with tqdm(total=2 * len(jobs), desc="pivoted QR", unit="step", disable=not progress) as bar:

        def report(done: int) -> None:
            bar.update(done - bar.n)

        chosen = choose_pivots(jobs, options, report)
        open_ = [i for i, one in enumerate(chosen) if one.factors is None]
        made = from_pivots(
            [jobs[i] for i in open_],
            [chosen[i].pivots for i in open_],
            after(2 * len(jobs) - len(open_), report),
        )
        report(2 * len(jobs))
    for i, factors in zip(open_, made, strict=True):
        chosen[i] = chosen[i]._replace(factors=factors)
    return [
        _result(job, one, exponent, out_dtype)
        for job, one, exponent in zip(jobs, chosen, exponents, strict=True)
    ]


@start_computation
def rebuild_pivoted_qr(
    weight: Tensor, pivots: Tensor, out_dtype: torch.dtype | None = None
) -> PivotedQR:
    """The factors that ``pivoted_qr`` gave for ``weight``, from its stored pivots alone.

    A search for as many pivots makes the factors in both places, so on the machine that stored the
    pivots the bits are the same. Pivots that it does not find again are taken as they are.

    Parameters
    ----------
    weight : Tensor [N, K]
    pivots : Tensor [r] of integers
        Distinct columns of ``weight``.
    """
    [(name, weight)] = named_matrices(weight).items()
    check_out_dtype(out_dtype)
    if pivots.ndim != 1 or pivots.is_floating_point() or not 1 <= len(pivots) <= min(weight.shape):
        raise ValueError(
            f"pivots must be 1 to min(N, K) = {min(weight.shape)} column indices, got "
            f"{pivots.dtype} of shape {tuple(pivots.shape)}"
        )
    pivots = pivots.to(weight.device, torch.int64)
    if int(pivots.min()) < 0 or int(pivots.max()) >= weight.shape[1]:
        raise ValueError(f"pivots must lie in [0, K = {weight.shape[1]}), got {pivots.tolist()}")
    if len(torch.unique(pivots)) != len(pivots):
        raise ValueError(f"pivots must be distinct columns of {name}, got {pivots.tolist()}")
    weight, exponent = in_range(name, weight)
    job = Job(name, weight, len(pivots), out_dtype or weight.dtype)
    [factors] = from_pivots([job], [pivots], lambda _: None)
    if not bool((factors[2] > 0).all()):  # NaN included
        raise ValueError(f"pivots must be independent columns of {name}, got {pivots.tolist()}")
    return _result(job, Chosen(pivots, False, None, factors), exponent, out_dtype)


def _result(job: Job, chosen: Chosen, exponent: int, out_dtype: torch.dtype | None) -> PivotedQR:
    """The factors of the matrix that is the job's · 2ᵉ, from those of the job's."""
    assert chosen.factors is not None
    q, r, diagonal = chosen.factors
    if out_dtype is None and job.dtype == torch.float16 and not is_held(r):
        wider = job._replace(dtype=torch.float32)
        [(q, r, diagonal)] = from_pivots([wider], [chosen.pivots], lambda _: None)
    r, diagonal = times_two_to(exponent, r), times_two_to(exponent, diagonal)
    check_held(job.name, "r", r, diagonal[:1])
    return PivotedQR(q, r, chosen.pivots, diagonal, len(diagonal), chosen.deficient, chosen.bracket)
