"""Batched, truncated, column-pivoted QR: the start of QR-LoRA (arXiv 2508.21810)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, overload

import torch
from torch import Tensor
from tqdm import tqdm

from . import cpu_core, cuda_core
from .checks import check_out_dtype, check_rank_fits, named_matrices
from .cpu_core import Factors
from .exponents import check_held, in_range, is_held, times_two_to
from .factors import factors_from_pivots
from .precision import start_computation
from .rules import RankRule, check_rank_options
from .search import Chosen, RankOptions, Report, after, choose_pivots


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


@overload
def pivoted_qr(
    weights: Tensor,
    rank: int | None = ...,
    tau: float | None = ...,
    rank_rule: RankRule = ...,
    max_rank: int | None = ...,
    exact: bool = ...,
    axis: int = ...,
    out_dtype: torch.dtype | None = ...,
    progress: bool = ...,
) -> PivotedQR: ...
@overload
def pivoted_qr(
    weights: Sequence[Tensor],
    rank: int | None = ...,
    tau: float | None = ...,
    rank_rule: RankRule = ...,
    max_rank: int | None = ...,
    exact: bool = ...,
    axis: int = ...,
    out_dtype: torch.dtype | None = ...,
    progress: bool = ...,
) -> list[PivotedQR]: ...
@start_computation
def pivoted_qr(
    weights: Tensor | Sequence[Tensor],
    rank: int | None = None,
    tau: float | None = None,
    rank_rule: RankRule = "magnitude",
    max_rank: int | None = None,
    exact: bool = True,
    axis: int = 1,
    out_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> PivotedQR | list[PivotedQR]:
    """Column-pivoted QR of a matrix or a list of matrices, stopped at the rank that is wanted.

    The pivots are the greedy ones of LAPACK's geqp3 for the same values in fp64. Ties (norms²
    within a relative 1e-13) go to the lowest column index. Results do not depend on the other
    matrices of a list. Inputs are not modified, and not copied whole up to min(N, K) / 5 pivots;
    for more, and for rules that need the whole diagonal, the CPU core keeps a residual in fp64.

    Parameters
    ----------
    weights : Tensor [N, K] or sequence of them
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
    PivotedQR, or a list of them for a sequence

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
    named, single = named_matrices(weights)
    if axis in (-2, 0):
        named = [(name, weight.mT) for name, weight in named]
    for name, weight in named:
        if rank is not None:
            check_rank_fits(name, rank, weight)
    scaled = [in_range(name, weight) for name, weight in named]
    named = [(name, weight) for (name, _), (weight, _) in zip(named, scaled, strict=True)]
    options = RankOptions(rank, tau, rank_rule, max_rank, exact)
    dtypes = [out_dtype or weight.dtype for _, weight in named]
    with tqdm(total=2 * len(named), desc="pivoted QR", unit="step", disable=not progress) as bar:
        chosen = choose_pivots(named, options, dtypes, lambda done: _advance(bar, done))
        open_ = [i for i, one in enumerate(chosen) if one.factors is None]
        made = _factors(
            [named[i][1] for i in open_],
            [chosen[i].pivots for i in open_],
            [dtypes[i] for i in open_],
            lambda done: _advance(bar, 2 * len(named) - len(open_) + done),
        )
        factors = dict(zip(open_, made, strict=True))
        _advance(bar, 2 * len(named))
    results = [
        _result(name, weight, one, one.factors or factors[i], exponent, out_dtype)
        for i, ((name, weight), one, (_, exponent)) in enumerate(
            zip(named, chosen, scaled, strict=True)
        )
    ]
    return results[0] if single else results


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
    [(name, weight)], _ = named_matrices(weight)
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
    [factors] = _factors([weight], [pivots], [out_dtype or weight.dtype], lambda _: None)
    if not bool((factors[2] > 0).all()):  # NaN included
        raise ValueError(f"pivots must be independent columns of {name}, got {pivots.tolist()}")
    chosen = Chosen(pivots, False, None, None)
    return _result(name, weight, chosen, factors, exponent, out_dtype)


def _result(
    name: str,
    weight: Tensor,
    chosen: Chosen,
    factors: Factors,
    exponent: int,
    out_dtype: torch.dtype | None,
) -> PivotedQR:
    """The factors of ``name``, which is ``weight`` · 2ᵉ, from those of ``weight``."""
    q, r, diagonal = factors
    if out_dtype is None and weight.dtype == torch.float16 and not is_held(r):
        [(q, r, diagonal)] = _factors([weight], [chosen.pivots], [torch.float32], lambda _: None)
    r, diagonal = times_two_to(exponent, r), times_two_to(exponent, diagonal)
    check_held(name, "r", r, diagonal[:1])
    return PivotedQR(q, r, chosen.pivots, diagonal, len(diagonal), chosen.deficient, chosen.bracket)


def _factors(
    weights: Sequence[Tensor],
    pivots: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    report: Report,
) -> list[Factors]:
    """(q, r, diagonal) of each matrix, a function of the matrix and the pivots alone.

    On the CPU the pivots are searched again, because a search with their number as its limit makes
    the very factors that the first one did or would have made; pivots that it does not confirm are
    taken as they are.
    """
    on_gpu = [i for i, weight in enumerate(weights) if cuda_core.handles(weight)[0]]
    results = cuda_core.factors(
        [weights[i] for i in on_gpu],
        [pivots[i] for i in on_gpu],
        [dtypes[i] for i in on_gpu],
        report,
    )
    made = dict(zip(on_gpu, results, strict=True))
    native = [i for i, w in enumerate(weights) if i not in made and cpu_core.handles(w)]
    if native:
        found = cpu_core.search(
            [weights[i] for i in native],
            [len(pivots[i]) for i in native],
            None,
            0.0,
            1,
            [dtypes[i] for i in native],
            after(len(made), report),
        )
        for i, (again, factors) in zip(native, found, strict=True):
            if again is not None and factors and torch.equal(again.columns, pivots[i]):
                made[i] = factors
    for i, weight in enumerate(weights):
        if i not in made:
            made[i] = factors_from_pivots(weight, pivots[i], dtypes[i])
            report(len(made))
    return [made[i] for i in range(len(weights))]


def _advance(bar: tqdm[NoReturn], done: int) -> None:
    bar.update(done - bar.n)
