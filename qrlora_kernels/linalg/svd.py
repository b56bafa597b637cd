"""Truncated SVD for the start of LoRA-XS (arXiv 2405.17604)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor
from tqdm import tqdm

from .checks import check_finite, check_out_dtype, check_rank_fits, named_matrices
from .precision import start_computation, work_dtype
from .rules import check_rank_options

Which = Literal["top", "middle", "bottom"]


class TruncatedSVD(NamedTuple):
    """u [N, r], s [r] descending, vh [r, K]; the largest entry of each column of u is positive."""

    u: Tensor
    s: Tensor
    vh: Tensor


@overload
def truncated_svd(
    weights: Tensor,
    rank: int,
    which: Which = ...,
    seed: int = ...,
    tol: float = ...,
    out_dtype: torch.dtype | None = ...,
    progress: bool = ...,
) -> TruncatedSVD: ...
@overload
def truncated_svd(
    weights: Sequence[Tensor],
    rank: int,
    which: Which = ...,
    seed: int = ...,
    tol: float = ...,
    out_dtype: torch.dtype | None = ...,
    progress: bool = ...,
) -> list[TruncatedSVD]: ...
@start_computation
def truncated_svd(
    weights: Tensor | Sequence[Tensor],
    rank: int,
    which: Which = "top",
    seed: int = 0,
    tol: float = 1e-3,
    out_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> TruncatedSVD | list[TruncatedSVD]:
    """``rank`` singular triplets of a matrix or of each matrix of a list.

    "top" runs a randomised block Krylov iteration (Halko et al. 2011; Musco and Musco 2015) with a
    fixed seed and checks its residual; where the tail is not resolved within the cost of a full
    SVD, the full SVD is taken. "middle" (around the median singular value) and "bottom" always take
    the full SVD. The global random state is not touched.

    Parameters
    ----------
    weights : Tensor [N, K] or sequence of them
    rank : int
        r ≤ min(N, K).
    which : {"top", "middle", "bottom"}
    seed : int
        Seed of the test matrix; the same for every matrix, so a list gives what single calls give.
    tol : float
        Largest accepted ‖Wᵀu - σv‖ over the triplets, relative to σ_1.
    out_dtype : torch.dtype, optional
        dtype of the factors; the weight's by default. Computed in fp64 for fp64, else in fp32.
    progress : bool
        Show a progress bar over the list.

    Returns
    -------
    TruncatedSVD, or a list of them for a sequence

    Raises
    ------
    TypeError, ValueError
        Name the argument, and which matrix of the list.
    """
    check_rank_options(rank, None, "magnitude", None)
    check_out_dtype(out_dtype)
    if which not in get_args(Which):
        raise ValueError(f"which must be one of {', '.join(get_args(Which))}, got {which!r}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    named, single = named_matrices(weights)
    results = []
    for name, weight in tqdm(named, desc="SVD", unit="matrix", disable=not progress):
        check_rank_fits(name, rank, weight)
        work = weight.to(work_dtype(weight))
        check_finite(name, work)
        found = _krylov(work, rank, seed, tol) if which == "top" else None
        u, s, vh = found if found is not None else _full(work, rank, which)
        results.append(_canonical(u, s, vh, out_dtype or weight.dtype))
    return results[0] if single else results


def _krylov(weight: Tensor, rank: int, seed: int, tol: float) -> TruncatedSVD | None:
    """Top triplets, or None where the residual stays above ``tol`` within a full SVD's cost."""
    rows, columns = weight.shape
    width = rank + max(8, rank // 4)
    # Beyond a third of the smaller side the Krylov basis costs more than the full SVD.
    blocks = min(rows, columns) // (3 * width)
    if blocks < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    last = torch.linalg.qr(weight @ start.to(weight)).Q
    basis = last
    for step in range(1, blocks):
        last = weight @ (weight.mT @ last)
        for _ in range(2):
            last = last - basis @ (basis.mT @ last)
            last = torch.linalg.qr(last).Q
        basis = torch.cat([basis, last], 1)
        if step % 2 and step + 1 < blocks:
            continue
        found, residual = _ritz(weight, basis, rank)
        if residual <= tol:
            return found
    return None


def _ritz(weight: Tensor, basis: Tensor, rank: int) -> tuple[TruncatedSVD, float]:
    """Rayleigh-Ritz triplets of ``weight`` in the span of ``basis`` and their largest residual."""
    small = basis.mT @ weight
    values, vectors = torch.linalg.eigh((small @ small.mT).double())
    left = vectors.flip(1)[:, :rank].to(weight)
    s = values.flip(0)[:rank].clamp(min=0).sqrt().to(weight)
    vh = torch.linalg.qr((left.mT @ small).mT).Q.mT
    u = basis @ left
    vh = vh * torch.where((u.mT @ weight * vh).sum(1) < 0, -1.0, 1.0).to(weight)[:, None]
    # Wᵀu - σv vanishes by construction of v, so the other side shows what the basis lacks.
    residual = (weight @ vh.mT - u * s).norm(dim=0).max() / s[0].clamp(min=1e-30)
    return TruncatedSVD(u, s, vh), float(residual)


def _full(weight: Tensor, rank: int, which: Which) -> TruncatedSVD:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    spare = len(s) - rank
    first = {"top": 0, "middle": spare // 2, "bottom": spare}[which]
    part = slice(first, first + rank)
    return TruncatedSVD(u[:, part], s[part], vh[part])


def _canonical(u: Tensor, s: Tensor, vh: Tensor, dtype: torch.dtype) -> TruncatedSVD:
    peak = u.gather(0, u.abs().argmax(0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(u)
    return TruncatedSVD(
        (u * sign).to(dtype).contiguous(),
        s.to(dtype).clone(),
        (vh * sign.mT).to(dtype).contiguous(),
    )
