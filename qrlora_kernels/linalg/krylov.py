"""Top singular triplets by a randomised block Krylov iteration (Musco and Musco 2015)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 16
# Measured on Gaussian matrices: beyond a rank of MOST_RANK * side, or of side² / SIDE2_PER_RANK,
# the basis costs about as much as a full SVD. At MOST_BASIS * side the search ends.
MOST_RANK = 0.15
SIDE2_PER_RANK = 6500
MOST_BASIS = 0.75
# Between two checks the basis grows by these factors.
LEAST_GROWTH, MOST_GROWTH = 1.1, 1.3
PROBE_STEPS = 3
# Share of a block's norm under which nothing but rounding is left of it, and the largest accepted
# entry of UᵀU - I.
EXHAUSTED, ORTHOGONAL = 1e-5, 1e-4

Triplets = tuple[Tensor, Tensor, Tensor]


def top_triplets(weight: Tensor, rank: int, seed: int, tol: float) -> Triplets | None:
    """u [N, r], s [r], vh [r, K] of ``weight`` [N, K], or None where a full SVD has to be taken.

    Parameters
    ----------
    tol : float
        Largest accepted ‖W v - σu‖ over the triplets, relative to σ_1.
    """
    if weight.shape[0] > weight.shape[1]:  # the basis lies on the shorter side
        found = top_triplets(weight.mT, rank, seed, tol)
        return found and (found[2].mT, found[1], found[0].mT)
    side = weight.shape[0]
    if rank > min(MOST_RANK * side, side**2 / SIDE2_PER_RANK):
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
        size, residual = basis.size, _residual(weight, triplets)
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
        """Rayleigh-Ritz triplets in the span of the basis; None where they have no meaning.

        The eigenvectors of the large problem, in the weight's precision, give the subspace; its
        values and vectors come from a problem of order ``rank`` in fp64.
        """
        columns, images = self._columns[: self.size], self._images[: self.size]
        gram = images @ images.mT
        if not bool(torch.isfinite(gram).all()):  # of values whose squares overflow
            return None
        left = torch.linalg.eigh(gram)[1][:, -rank:]
        image = (images.mT @ left).double()
        values, turn = torch.linalg.eigh(image.mT @ image)
        turn, s = turn.flip(1), values.flip(0).clamp(min=0).sqrt().to(columns)
        # QR and not a division by s, which may be zero.
        right, triangle = torch.linalg.qr((image @ turn).to(columns))
        sign = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(right)
        u = columns.mT @ (left @ turn.to(left))
        # Part of a block may have been rounding: its directions are not orthogonal to the others.
        error = (u.mT @ u - torch.eye(rank).to(u)).abs().max()
        return (u, s, (right * sign).mT) if float(error) < ORTHOGONAL else None


def _draw(weight: Tensor, generator: torch.Generator) -> Tensor:
    shape = (weight.shape[1], BLOCK)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(weight)


def _residual(weight: Tensor, triplets: Triplets) -> float:
    """Largest ‖W v - σu‖ over σ_1; ‖Wᵀu - σv‖ vanishes by construction of v."""
    u, s, vh = triplets
    return float((weight @ vh.mT - u * s).norm(dim=0).max() / s[0].clamp(min=1e-30))


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
