"""Products with a weight of any dtype and stride, as exact as their dtype, panel by panel.

A half-precision weight is never converted whole: a panel of columns at a time is, so the extra
memory stays a few tens of MiB whatever the matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PANEL_BYTES = 32 << 20


def work_dtype(weight: Tensor) -> torch.dtype:
    """fp32 for half and fp32 weights, fp64 for fp64 and where fp32 products may be TF32 or bf16.

    A single TF32 or bf16 pass loses the order of the pivots.
    """
    mkldnn: Any = torch.backends.mkldnn  # its stub does not know `matmul`
    settings = (torch.backends, torch.backends.cuda.matmul, mkldnn.matmul)
    exact = all(setting.fp32_precision in ("none", "ieee") for setting in settings)
    return torch.float32 if exact and weight.dtype != torch.float64 else torch.float64


def panel_width(weight: Tensor, dtype: torch.dtype) -> int:
    """Columns that a panel in ``dtype`` has."""
    return max(PANEL_BYTES // (weight.shape[0] * dtype.itemsize), 16)


def column_norms2(weight: Tensor) -> Tensor:
    """Squared column norms [K] in fp64; NaN or Inf where a column holds one."""
    panels = weight.split(panel_width(weight, torch.float64), dim=1)
    return torch.cat([panel.double().square().sum(0) for panel in panels])


def project(q: Tensor, weight: Tensor) -> Tensor:
    """Qᵀ W [b, K] for q [N, b], in q's dtype."""
    columns = weight.shape[1]
    out = torch.empty(q.shape[1], columns, dtype=q.dtype, device=q.device)
    width = columns if weight.dtype == q.dtype else panel_width(weight, q.dtype)
    for start in range(0, columns, width):
        part = slice(start, start + width)
        out[:, part] = q.mT @ weight[:, part].to(q.dtype)
    return out
