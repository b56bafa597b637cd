"""Products with a weight of any dtype and stride, a panel of columns at a time.

A half-precision weight is never converted whole: a panel at a time is, so the extra memory stays a
few tens of MiB whatever the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PANEL_BYTES = 32 << 20


def column_panels(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of columns and those columns in ``dtype``; one panel where nothing is converted."""
    rows, columns = weight.shape
    width = columns
    if weight.dtype != dtype:
        width = max(PANEL_BYTES // (rows * dtype.itemsize), 16)
    for start in range(0, columns, width):
        part = slice(start, min(start + width, columns))
        yield part, weight[:, part].to(dtype)


def column_norms2(weight: Tensor) -> Tensor:
    """Squared column norms [K] in fp64; NaN or Inf where a column holds one."""
    norms = torch.empty(weight.shape[1], dtype=torch.float64, device=weight.device)
    rows, columns = weight.shape
    width = max(PANEL_BYTES // (rows * 8), 16)
    for start in range(0, columns, width):
        part = weight[:, start : start + width].double()
        norms[start : start + width] = (part * part).sum(0)
    return norms


def project(q: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Qᵀ W [b, K] for q [N, b], in q's dtype."""
    if out is None:
        out = torch.empty(q.shape[1], weight.shape[1], dtype=q.dtype, device=q.device)
    for part, panel in column_panels(weight, q.dtype):
        out[:, part] = q.mT @ panel
    return out
