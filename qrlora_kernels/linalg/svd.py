"""Truncated SVD for the start of LoRA-XS (arXiv 2405.17604)."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .checks import Named, check_choice, check_out_dtype, check_rank_fits
from .exponents import in_range, rounded, times_two_to
from .factorisation import factorisation
from .krylov import is_ahead, top_triplets
from .parallel import map_matrices
from .products import work_dtype
from .ritz import Triplets, dense_triplets
from .rules import check_rank_options

Which = Literal["top", "middle", "bottom"]


class TruncatedSVD(NamedTuple):
    """u [N, r], s [r] descending, vh [r, K]; the largest entry of each column of u is positive.

    s is in fp32 or wider: a singular value may exceed what holds u and vh.
    """

    u: Tensor
    s: Tensor
    vh: Tensor


@factorisation
def truncated_svd(
    weights: Named,
    rank: int,
    which: Which = "top",
    seed: int = 0,
    tol: float = 1e-3,
    out_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> list[TruncatedSVD]:
    """``rank`` singular triplets of a matrix or of each matrix of a list.

    "top" of a low rank runs a randomised block Krylov iteration (Halko et al. 2011; Musco and Musco
    2015) with a fixed seed; of a rank to min(N, K)/2, or where that does not converge, it comes
    from the Gram matrix of the shorter side. Both check their residual; where neither passes, for
    higher ranks, and for "middle" (around the median singular value) and "bottom", the full SVD is
    taken. The global random state is not touched. Small matrices run one per thread; results do not
    depend on the rest of the list.

    Parameters
    ----------
    weights : Tensor [N, K], or sequence of them or mapping from the names that errors use
    rank : int
        r ≤ min(N, K).
    which : {"top", "middle", "bottom"}
    seed : int
        Seed of the test matrix; the same for every matrix, so a list gives what single calls give.
    tol : float
        Largest accepted ‖Wᵀu - σv‖ over the triplets, relative to σ_1.
    out_dtype : torch.dtype, optional
        dtype of u and vh; the weight's by default. s has it too, in half precision fp32. Computed
        in fp64 for fp64, else in fp32.
    progress : bool
        Show a progress bar over the list.

    Returns
    -------
    TruncatedSVD, or a list of them for a sequence or a mapping

    Raises
    ------
    TypeError, ValueError
        Name the argument, and which matrix of the list.
    """
    check_rank_options(rank, None, "magnitude", None)
    check_out_dtype(out_dtype)
    check_choice("which", which, get_args(Which))
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")

    def one(name: str, weight: Tensor) -> TruncatedSVD:
        check_rank_fits(name, rank, weight)
        scaled, exponent = in_range(name, weight)
        work = scaled.to(work_dtype(weight))
        if 1 not in work.stride():
            work = work.contiguous()  # or every product would copy it
        found = _top(work, rank, seed, tol) if which == "top" else None
        u, s, vh = found or _full(work, rank, which)
        dtype = out_dtype or weight.dtype
        u, vh = _canonical(u, vh)
        s = times_two_to(exponent, s.double())
        s = rounded(name, "s", s, torch.promote_types(dtype, torch.float32))
        return TruncatedSVD(u.to(dtype).contiguous(), s, vh.to(dtype).contiguous())

    return map_matrices(one, weights, "SVD", progress)


def _top(weight: Tensor, rank: int, seed: int, tol: float) -> Triplets | None:
    first = is_ahead(weight, rank)
    found = top_triplets(weight, rank, seed, tol) if first else None
    found = found or dense_triplets(weight, rank, tol)
    return found if found or first else top_triplets(weight, rank, seed, tol)


def _full(weight: Tensor, rank: int, which: Which) -> TruncatedSVD:
    if weight.shape[0] < weight.shape[1]:  # LAPACK is faster on tall matrices
        flipped = _full(weight.mT, rank, which)
        return TruncatedSVD(flipped.vh.mT, flipped.s, flipped.u.mT)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    spare = len(s) - rank
    first = {"top": 0, "middle": spare // 2, "bottom": spare}[which]
    part = slice(first, first + rank)
    return TruncatedSVD(u[:, part], s[part], vh[part])


def _canonical(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    peak = u.gather(0, u.abs().argmax(0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(u)
    return u * sign, vh * sign.mT
