"""Singular triplets from one Gram matrix: of a whole matrix, or inside a subspace of it."""

from __future__ import annotations

import torch
from torch import Tensor

# Share of the shorter side from which the triplets cost as much as a full SVD.
MOST_RANK = 0.5
# Largest accepted residual over σ_1, by dtype: ten times what Gaussian matrices leave. A triplet is
# lost to the squares of the Gram matrix where σ_r falls under some 1e-3 (fp64: 1e-7) of σ_1.
EXACT = {torch.float32: 1e-5, torch.float64: 1e-13}

Triplets = tuple[Tensor, Tensor, Tensor]


def dense_triplets(weight: Tensor, rank: int, tol: float) -> Triplets | None:
    """u [N, r], s [r], vh [r, K] of ``weight`` [N, K], or None where only a full SVD has them.

    An eigenproblem of the shorter side is half of what a full SVD costs. Taken where the residual
    ‖W v - σu‖ / σ_1 is at most ``tol`` and as small as rounding leaves it.
    """
    if weight.shape[0] > weight.shape[1]:  # the eigenproblem has the shorter side's order
        found = dense_triplets(weight.mT, rank, tol)
        return found and (found[2].mT, found[1], found[0].mT)
    if rank > MOST_RANK * weight.shape[0]:
        return None
    found = top_of_images(weight, rank)
    accepted = min(tol, EXACT[weight.dtype])
    if found is None or not residual(weight, found) <= accepted:  # NaN included
        return None
    return found


def top_of_images(images: Tensor, rank: int) -> Triplets | None:
    """Triplets of ``images`` [n, K]: of a matrix, or of its images Qᵀ W of a basis Q [N, n].

    Rayleigh and Ritz: the eigenvectors of the large problem, in the images' precision, give the
    subspace; its values and vectors come from a problem of order ``rank`` in fp64. None where the
    squares overflow.

    Returns
    -------
    u [n, r], s [r], vh [r, K]
    """
    gram = images @ images.mT
    if not bool(torch.isfinite(gram).all()):
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
