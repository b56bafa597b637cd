"""Top singular triplets by a randomised block Krylov iteration (Musco and Musco 2015)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ritz import Triplets, is_orthogonal, top_of_images
from .ritz import residual as residual_of

BLOCK = 16
# Measured on Gaussian matrices, one thread: beyond a rank of MOST_RANK * side, or of
# side² / SIDE2_PER_RANK, the basis costs about as much as a full SVD. At MOST_BASIS * side the
# search ends.
MOST_RANK = 0.15
SIDE2_PER_RANK = 6500
MOST_BASIS = 0.75
# Likewise beyond a rank of FLAT_RANK * side, or of side³ over COST_PER_RANK * the longer side, as
# an eigenproblem of the whole matrix. The values of a Gaussian square lie flat: their mean square
# is a quarter of σ_1²; where it is under FLAT of it they fall, and the basis ends early.
FLAT_RANK = 0.11
COST_PER_RANK = 12000
FLAT = 0.1
POWER_STEPS = 6
# Between two checks the basis grows by these factors.
LEAST_GROWTH, MOST_GROWTH = 1.1, 1.3
PROBE_STEPS = 3
EXHAUSTED = 1e-5  # share of a block's norm under which nothing but rounding is left of it


def is_ahead(weight: Tensor, rank: int) -> bool:
    """Whether the iteration is quicker than an eigenproblem of the shorter side."""
    side, other = sorted(weight.shape)
    if rank <= min(FLAT_RANK * side, side**3 / (COST_PER_RANK * other)):
        return True
    if rank > _most_rank(side):
        return False
    vector = weight.new_ones(weight.shape[1])
    for _ in range(POWER_STEPS):
        vector = weight.mT @ (weight @ vector)
        vector /= vector.norm()
    largest = float((weight @ vector).double().square().sum())  # at most σ_1²
    return float(weight.double().square().mean()) * other < FLAT * largest  # not for NaN


def _most_rank(side: int) -> float:
    return min(MOST_RANK * side, side**2 / SIDE2_PER_RANK)


def top_triplets(weight: Tensor, rank: int, seed: int, tol: float) -> Triplets | None:
    """u [N, r], s [r], vh [r, K] of ``weight`` [N, K], or None where it does not pay.

    Parameters
    ----------
    tol : float
        Largest accepted ‖W v - σu‖ over the triplets, relative to σ_1.
    """
    if weight.shape[0] > weight.shape[1]:  # the basis lies on the shorter side
        found = top_triplets(weight.mT, rank, seed, tol)
        return found and (found[2].mT, found[1], found[0].mT)
    side = weight.shape[0]
    if rank > _most_rank(side):
        return None
    limit = int(MOST_BASIS * side) // BLOCK * BLOCK
    generator = torch.Generator().manual_seed(seed)
    basis = _Basis(weight, limit)
    basis.grow(weight @ _draw(weight, generator))
    size, residual, check = 0, math.inf, 2 * rank + 4 * BLOCK
    while basis.size < limit:
        while basis.size < min(check, limit):
            if not basis.grow(weight @ basis.last_image):
                return None
        triplets = basis.triplets(rank)
        if triplets is None:
            return None
        before = (size, residual)
        size, residual = basis.size, residual_of(weight, triplets)
        check = _next_check(*before, size, residual, tol)
        if not residual <= tol:  # NaN included
            continue
        missed = _missed_direction(weight, triplets, tol, generator)
        if missed is None:
            return triplets
        if basis.size < limit and not basis.grow(missed):
            return None
    return None


class _Basis:
    """Orthonormal columns Q [N, n] and their images Wᵀ Q [K, n], grown by blocks of columns."""

    def __init__(self, weight: Tensor, capacity: int) -> None:
        self.weight = weight
        self.size = 0
        # Transposed: memory is touched only as far as the basis has grown.
        self._columns = weight.new_empty(capacity, weight.shape[0])
        self._images = weight.new_empty(capacity, weight.shape[1])

    @property
    def last_image(self) -> Tensor:
        return self._images[self.size - BLOCK : self.size].mT

    def grow(self, block: Tensor) -> bool:
        """Add the directions of ``block`` [N, BLOCK] that the basis lacks; False if it lacks none.

        The space of a matrix of low rank ends early; what is left of a block is rounding, then.
        """
        known = self._columns[: self.size]
        for _ in range(2):
            rest = block - known.mT @ (known @ block)
            if not float(rest.norm()) > EXHAUSTED * float(block.norm()):  # NaN included
                return False
            block = torch.linalg.qr(rest).Q
        new = slice(self.size, self.size + BLOCK)
        self._columns[new] = block.mT
        torch.mm(block.mT, self.weight, out=self._images[new])
        self.size += BLOCK
        return True

    def triplets(self, rank: int) -> Triplets | None:
        """Rayleigh-Ritz triplets in the span of the basis; None where they have no meaning."""
        found = top_of_images(self._images[: self.size], rank)
        if found is None:
            return None
        left, s, vh = found
        u = self._columns[: self.size].mT @ left
        # Part of a block may have been rounding: its directions are not orthogonal to the others.
        return (u, s, vh) if is_orthogonal(u) else None


def _draw(weight: Tensor, generator: torch.Generator) -> Tensor:
    shape = (weight.shape[1], BLOCK)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(weight)


def _next_check(size0: int, residual0: float, size: int, residual: float, tol: float) -> int:
    """The size at which the residual, falling on as between two checks, would reach ``tol``."""
    least, most = int(LEAST_GROWTH * size), int(MOST_GROWTH * size)
    if not 0 < residual < residual0 < math.inf:
        return int(math.sqrt(LEAST_GROWTH * MOST_GROWTH) * size)
    fall = math.log(residual0 / residual) / (size - size0)
    return max(least, min(most, size + math.ceil(math.log(residual / tol) / fall)))


def _missed_direction(
    weight: Tensor, triplets: Triplets, tol: float, generator: torch.Generator
) -> Tensor | None:
    """A block [N, BLOCK] with more than σ_r of W outside the triplets, or None.

    Of a singular value that is repeated more than BLOCK times a Krylov space sees only BLOCK
    directions, all of them with no residual.
    """
    u, s, _ = triplets
    block = weight @ _draw(weight, generator)
    for _ in range(PROBE_STEPS):
        block = torch.linalg.qr(block - u @ (u.mT @ block)).Q
        image = weight.mT @ block
        block = weight @ image
    largest = torch.linalg.matrix_norm(image.double(), 2)
    return block if float(largest) > float(s[-1]) + tol * float(s[0]) else None
