"""Starting factors of OHoRA (Zhang et al., EMNLP 2025): a Kronecker product of high rank."""

from __future__ import annotations

from math import isqrt
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .checks import Named, check_choice, check_finite, check_out_dtype
from .exponents import in_range, rounded, times_two_to
from .factorisation import factorisation
from .parallel import map_matrices
from .products import work_dtype
from .rules import check_rank_options

Columns = Literal["leading", "selected"]
Start = Literal["qr", "svd", "random", "kaiming"]


class KronFactors(NamedTuple):
    """a0 [N/r, r] and b0 [K/r, r] of A₀ ⊗ B₀ᵀ [N, K]."""

    a0: Tensor
    b0: Tensor


def high_rank(rows: int, columns: int) -> int:
    """r_high = max{k : k ≤ √N, k ≤ √K, k | N, k | K}; at least 1."""
    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be positive, got {rows} and {columns}")
    for k in range(isqrt(min(rows, columns)), 1, -1):
        if rows % k == 0 and columns % k == 0:
            return k
    return 1


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the singular values of ``matrix`` [N, K] scaled to sum to 1 (eq. 17).

    Lies between 1 and min(N, K); 0 for a zero matrix.
    """
    scaled, _ = in_range("matrix", matrix.double())
    values = torch.linalg.svdvals(scaled)
    total = values.sum()
    if total == 0:
        return 0.0
    share = values / total
    return float(torch.special.entr(share).sum().exp())


@factorisation
def kron_factors(
    weights: Named,
    rank: int | None = None,
    columns: Columns = "leading",
    start: Start = "qr",
    seed: int = 0,
    out_dtype: torch.dtype | None = None,
    cut: bool = True,
    progress: bool = False,
) -> list[KronFactors]:
    """A₀ [N/r, r] and B₀ [K/r, r] of a matrix W [N, K] or of each matrix of a list.

    With W = Q R unpivoted, I₁ the r largest \\|R_ii\\| and I₂ the next r (eq. 8, 9):
    A₀ = Q[:N/r, I₁] R[I₁, :r], B₀ = Q[:K/r, I₂] R[I₂, :r]. The signs of Q and R cancel in both.

    Parameters
    ----------
    weights : Tensor [N, K], or sequence of them or mapping from the names that errors use
    rank : int, optional
        A divisor of N and K, at most ``high_rank(N, K)``, the default.
    columns : {"leading", "selected"}
        "leading" is the paper's R[I, :r]. Rows of R past the r-th are zero there, which loses rank;
        "selected" takes R[I, I] and keeps it.
    start : {"qr", "svd", "random", "kaiming"}
        "svd": U for Q, diag(S) Vᵀ for R and S for the diagonal. "random": the 2r indices of the QR
        drawn without replacement. "kaiming": Kaiming-uniform, independent of W.
    seed : int
        Of "random" and "kaiming"; the same for every matrix. The global state is not touched.
    out_dtype : torch.dtype, optional
        dtype of the factors; the weight's by default. Computed in fp64 for fp64, else in fp32.
    cut : bool
        False keeps all rows, a0 [N, r] and b0 [K, r] with K ≤ N, for the ablation A₀ B₀ᵀ.
    progress : bool
        Show a progress bar over the list.

    Raises
    ------
    TypeError, ValueError
        Name the argument, and which matrix of the list. Among them: ``rank`` does not divide N and
        K or exceeds r_high; fewer than 2r diagonal entries; K/r rows asked of a Q that has N < K/r
        (a matrix more than r times wider than tall: the paper's formula has no B₀ there, use
        "kaiming"); both factors zero, from which no gradient leads away; a factor that its dtype
        cannot hold.
    """
    check_rank_options(rank, None, "magnitude", None)
    check_out_dtype(out_dtype)
    check_choice("columns", columns, get_args(Columns))
    check_choice("start", start, get_args(Start))
    if start == "kaiming" and not cut:
        raise ValueError("cut must be True for start='kaiming', which draws A0 and B0 as they are")

    def one(name: str, weight: Tensor) -> KronFactors:
        r = _check_rank(name, weight, rank, start)
        dtype = out_dtype or weight.dtype
        if start == "kaiming":
            check_finite(name, weight)
            a0, b0 = _kaiming(weight, r, seed)
            return KronFactors(a0.to(dtype), b0.to(dtype))
        scaled, exponent = in_range(name, weight)
        pair = _from_factors(name, scaled, r, columns, start, seed, cut)
        _check_can_train(name, pair)
        a0, b0 = (times_two_to(exponent, factor.double()) for factor in pair)
        return KronFactors(rounded(name, "a0", a0, dtype), rounded(name, "b0", b0, dtype))

    return map_matrices(one, weights, "Kronecker start", progress)


def _check_rank(name: str, weight: Tensor, rank: int | None, start: Start) -> int:
    rows, columns = weight.shape
    highest = high_rank(rows, columns)
    r = highest if rank is None else rank
    if r > highest or rows % r or columns % r:
        raise ValueError(
            f"rank must divide N and K and be at most r_high = {highest} for {name} of shape "
            f"{(rows, columns)}, got {r}"
        )
    if start == "kaiming":
        return r
    if 2 * r > min(rows, columns):
        raise ValueError(
            f"{name} of shape {(rows, columns)} must have 2r = {2 * r} diagonal entries"
        )
    if columns // r > rows:
        raise ValueError(
            f"{name} of shape {(rows, columns)} must have at least K/r = {columns // r} rows for "
            f"B0 = Q[:K/r, I2] R[I2, :r] at rank {r}; use start='kaiming'"
        )
    return r


def _check_can_train(name: str, pair: KronFactors) -> None:
    """At A = B = 0 both gradients vanish for good."""
    if not bool(pair.a0.any()) and not bool(pair.b0.any()):
        raise ValueError(
            f"{name} must give a start other than zero, but the chosen rows of R are zero in their "
            "first r columns; use columns='selected' or another seed"
        )


def _from_factors(
    name: str, weight: Tensor, r: int, columns: Columns, start: Start, seed: int, cut: bool
) -> KronFactors:
    n, k = weight.shape
    if not cut and k > n:
        raise ValueError(f"{name} must not be wider than tall without cut, got {[n, k]}")
    rows = (n // r, k // r) if cut else (n, k)
    # R beyond its square part is never read: a wide matrix is cut before it is factorised.
    work = weight[:, : min(n, k)] if start != "svd" else weight
    work = work.to(work_dtype(weight))
    if start == "svd":
        u, s, vh = torch.linalg.svd(work, full_matrices=False)
        chosen = torch.arange(2 * r, device=work.device)  # S is in descending order
        left, right = u[:, chosen], s[chosen, None] * vh[chosen]
    else:
        reflectors, scales = torch.geqrf(work)
        chosen = _indices(reflectors.diagonal(), r, start, seed)
        left = _part_of_q(reflectors, scales, max(rows), chosen)
        right = reflectors.triu()[chosen]

    def factor(height: int, part: slice) -> Tensor:
        kept = right[part, :r] if columns == "leading" else right[part, chosen[part]]
        return torch.mm(left[:height, part], kept)

    return KronFactors(factor(rows[0], slice(0, r)), factor(rows[1], slice(r, 2 * r)))


def _part_of_q(reflectors: Tensor, scales: Tensor, rows: int, chosen: Tensor) -> Tensor:
    """At least the first ``rows`` rows of the chosen columns of Q, by whichever are fewer."""
    n, count = reflectors.shape[0], len(chosen)
    if rows >= count:
        unit = reflectors.new_zeros(n, count)
        unit[chosen, torch.arange(count, device=unit.device)] = 1.0
        return torch.ormqr(reflectors, scales, unit)
    return torch.ormqr(reflectors, scales, torch.eye(n, rows).to(reflectors), transpose=True)[
        chosen
    ].mT


def _indices(diagonal: Tensor, r: int, start: Start, seed: int) -> Tensor:
    """I₁ and I₂, one after the other, [2r]."""
    if start == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(diagonal), generator=generator)[: 2 * r].to(diagonal.device)
    order = torch.sort(diagonal.abs(), descending=True, stable=True).indices
    return order[: 2 * r]


def _kaiming(weight: Tensor, r: int, seed: int) -> KronFactors:
    """Uniform in ±1/√fan_in with fan_in = r, as nn.Linear starts."""
    generator = torch.Generator().manual_seed(seed)
    n, k = weight.shape

    def draw(rows: int) -> Tensor:
        unit = torch.rand(rows, r, generator=generator, dtype=torch.float64)
        return unit.mul_(2).sub_(1).div_(r**0.5).to(weight.device)

    return KronFactors(draw(n // r), draw(k // r))
