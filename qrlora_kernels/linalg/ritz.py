"""Singular triplets from one Gram matrix: of a whole matrix, or inside a subspace of it."""

from __future__ import annotations

import torch
from torch import Tensor

# A shorter side to which a full SVD is quick; the share of it from which triplets cost as much.
SMALL, MOST_RANK = 256, 0.5
# The least σ at that share over σ_1: the squares of a Gram matrix lose small ones to rounding. And
# the largest accepted residual over σ_1, by dtype: twice what is left there.
LEAST, EXACT = 0.02, {torch.float32: 3e-5, torch.float64: 3e-13}
ORTHOGONAL = 1e-4  # the largest accepted entry of UᵀU - I
BLOCK = 32
POWER_STEPS = 8

Triplets = tuple[Tensor, Tensor, Tensor]


def dense_triplets(weight: Tensor, rank: int, tol: float) -> Triplets | None:
    """u [N, r], s [r], vh [r, K] of ``weight`` [N, K], or None where only a full SVD has them.

    An eigenproblem of the shorter side is half of what a full SVD costs. Taken for ranks to half of
    it where the residual ‖W v - σu‖ / σ_1 is at most ``tol`` and as small as rounding leaves it.
    Whether that can be is asked of the spectrum, not of the rank: a lower rank's triplets are the
    first of a higher rank's, to the bit.
    """
    if weight.shape[0] > weight.shape[1]:  # the eigenproblem has the shorter side's order
        found = dense_triplets(weight.mT, rank, tol)
        return found and (found[2].mT, found[1], found[0].mT)
    most = int(MOST_RANK * weight.shape[0])
    gram = _gram(weight) if weight.shape[0] > SMALL and rank <= most else None
    if gram is None:
        return None
    if weight.device.type == "cpu" and _falls_away(gram, most):
        return None
    squares, left = (t.flip(-1) for t in torch.linalg.eigh(gram))
    if not float(squares[most - 1]) >= LEAST**2 * float(squares[0]):
        return None
    right, s = left.new_empty(weight.shape[1], 0), left.new_empty(0, dtype=torch.float64)
    while right.shape[1] < rank:  # by blocks of one size, whatever the rank
        block = slice(right.shape[1], right.shape[1] + BLOCK)
        image = weight.mT @ left[:, block]
        right = torch.cat([right, _outside(right, image)], 1)
        s = torch.cat([s, image.double().norm(dim=0)])
    triplets = (
        left[:, :rank].contiguous(),
        s[:rank].cummin(0).values.to(weight),  # those of equal vectors differ by rounding
        right[:, :rank].mT.contiguous(),
    )
    accepted = min(tol, EXACT[weight.dtype])
    exact = residual(weight, triplets) <= accepted and is_orthogonal(right[:, :rank])
    return triplets if exact else None  # of NaN neither holds


def _falls_away(gram: Tensor, most: int) -> bool:
    """Whether fewer than ``most`` eigenvalues are LEAST² of the largest, as the signs of LDLᵀ tell
    (Sylvester) at a tenth of an eigenproblem's price."""
    vector = gram.sum(1)
    for _ in range(POWER_STEPS):
        vector = gram @ (vector / vector.norm().clamp(min=1e-30))
    least = LEAST**2 * vector.norm()  # at most LEAST² λ_1
    shifted = gram - least * torch.eye(gram.shape[0]).to(gram)
    factors, pivots, _ = torch.linalg.ldl_factor_ex(shifted)
    pairs = pivots < 0  # rows of blocks of two, which have a value of each sign
    positive = int((factors.diagonal()[~pairs] > 0).sum()) + int(pairs.sum()) // 2
    return positive < most


def _outside(known: Tensor, image: Tensor) -> Tensor:
    """Orthonormal columns that span those of ``image`` and are orthogonal to ``known``."""
    block = image
    for _ in range(2):
        # QR and not a division by the norms, which may be zero.
        block = torch.linalg.qr(block - known @ (known.mT @ block)).Q
    return block * torch.where((block * image).sum(0) < 0, -1.0, 1.0).to(block)


def is_orthogonal(columns: Tensor) -> bool:
    """Whether the columns are orthonormal to what rounding allows."""
    error = columns.mT @ columns - torch.eye(columns.shape[1]).to(columns)
    return float(error.abs().max()) < ORTHOGONAL


def _gram(images: Tensor) -> Tensor | None:
    """The Gram matrix of the rows, or None where their squares overflow."""
    gram = images @ images.mT
    return gram if bool(torch.isfinite(gram).all()) else None


def top_of_images(images: Tensor, rank: int) -> Triplets | None:
    """Triplets of ``images`` [n, K]: of a matrix, or of its images Qᵀ W of a basis Q [N, n].

    Rayleigh and Ritz: the eigenvectors of the large problem, in the images' precision, give the
    subspace; its values and vectors come from a problem of order ``rank`` in fp64. None where the
    squares overflow.

    Returns
    -------
    u [n, r], s [r], vh [r, K]
    """
    gram = _gram(images)
    if gram is None:
        return None
    left = torch.linalg.eigh(gram)[1][:, -rank:]
    image = (images.mT @ left).double()
    values, turn = torch.linalg.eigh(image.mT @ image)
    turn, s = turn.flip(1), values.flip(0).clamp(min=0).sqrt().to(images)
    # QR and not a division by s, which may be zero.
    right, triangle = torch.linalg.qr((image @ turn).to(images))
    sign = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(right)
    return left @ turn.to(left), s, (right * sign).mT


def residual(weight: Tensor, triplets: Triplets) -> float:
    """Largest ‖W v - σu‖ over σ_1; ‖Wᵀu - σv‖ vanishes by construction of v."""
    u, s, vh = triplets
    return float((weight @ vh.mT - u * s).norm(dim=0).max() / s[0].clamp(min=1e-30))
