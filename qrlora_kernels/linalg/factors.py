"""From pivots to factors, where no search of the native core has them already."""

from __future__ import annotations

import torch
from torch import Tensor

from .panels import project
from .precision import work_dtype


def factors_from_pivots(
    weight: Tensor, pivots: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, r], r [r, K] in the original column order and the diagonal [r] (fp64).

    Householder QR in fp64 of the pivot columns, signs chosen so that the diagonal is positive,
    then one pass Qᵀ W (fp64 for an fp64 weight, fp32 otherwise). The block at the pivots is the
    exact triangle: r[j, pivots[i]] is 0 for j > i and the diagonal for j = i.
    """
    q, triangle = torch.linalg.qr(weight[:, pivots].double())
    sign = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(q)
    q *= sign
    triangle *= sign[:, None]
    r = project(q.to(work_dtype(weight)), weight).to(out_dtype)
    r[:, pivots] = triangle.to(out_dtype)
    return q.to(out_dtype).contiguous(), r, triangle.diagonal().clone()
