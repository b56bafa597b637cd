"""What the searches for pivots are given, and what they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# As enum DType of csrc/core/include/qrlora/dtype.h.
CORE_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

Factors = tuple[Tensor, Tensor, Tensor]  # q [N, r], r [r, K], diagonal [r]
# Called with the number of matrices done; an exception from it ends the search.
Report = Callable[[int], None]


def after(before: int, report: Report) -> Report:
    """``report`` for a part of a list of which ``before`` are done already."""
    return lambda done: report(before + done)


class Job(NamedTuple):
    """A matrix of a list: its name in errors, the most pivots of it, the dtype of its factors."""

    name: str
    weight: Tensor
    limit: int
    dtype: torch.dtype


@dataclass
class Pivots:
    """Greedy pivots of one matrix.

    Attributes
    ----------
    columns : Tensor [k] int64
        Pivot columns in order.
    norms : Tensor [k] fp64
        Residual norm of each when it was taken, \\|R_ii\\|.
    bounds : Tensor [K] fp64
        Upper bounds of the residual norms² after k pivots, 0 at the pivots.
    deficient : bool
        Every column left depends on the pivots up to rounding.
    """

    columns: Tensor
    norms: Tensor
    bounds: Tensor
    deficient: bool
