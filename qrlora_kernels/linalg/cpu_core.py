"""Calls of the compiled CPU core: a whole list of matrices at a time, without the GIL."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..native import CORE
from .blocked import Pivots

# As enum DType of csrc/include/qrlora/dtype.h and enum RankRule of qrlora/cpu/pivoted_qr.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_RULES = {None: 0, "magnitude": 1, "energy": 2, "abs_sum": 3}
BLOCK = 128

Report = Callable[[int], None]
Factors = tuple[Tensor, Tensor, Tensor]


def handles(weight: Tensor) -> bool:
    """The core is there and the matrix is on the CPU."""
    return CORE is not None and weight.device.type == "cpu"


def search(
    weights: Sequence[Tensor],
    limits: Sequence[int],
    rule: str | None,
    tau: float,
    max_rank: int,
    report: Report,
) -> list[Pivots | None]:
    """Pivots of each CPU matrix; None for one with NaN, Inf or overflow.

    Parameters
    ----------
    limits : sequence of int
        Most pivots of each matrix.
    rule : str or None
        "magnitude" stops at its rank, "energy" and "abs_sum" where theirs is bracketed or known to
        reach ``max_rank``.
    report : callable
        Called with the number of matrices done; an exception from it ends the search.
    """
    assert CORE is not None
    found = CORE.pivot_search(
        [_matrix(weight) for weight in weights],
        list(limits),
        _RULES[rule],
        tau,
        max_rank,
        BLOCK,
        torch.get_num_threads(),
        report,
    )
    return [
        Pivots(
            torch.tensor(columns, dtype=torch.int64),
            torch.tensor(norms, dtype=torch.float64),
            torch.tensor(bounds, dtype=torch.float64),
            deficient,
        )
        if finite
        else None
        for columns, norms, bounds, deficient, finite in found
    ]


def factors(
    weights: Sequence[Tensor],
    pivots: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    report: Report,
) -> list[Factors]:
    """q [N, r], r [r, K] and the fp64 diagonal [r] of each CPU matrix from its pivots."""
    assert CORE is not None
    results, outputs = [], []
    for weight, chosen, dtype in zip(weights, pivots, dtypes, strict=True):
        (rows, columns), count = weight.shape, len(chosen)
        q = torch.empty(rows, count, dtype=dtype)
        r = torch.empty(count, columns, dtype=dtype)
        diagonal = torch.empty(count, dtype=torch.float64)
        results.append((q, r, diagonal))
        outputs.append((q.data_ptr(), r.data_ptr(), _DTYPES[dtype], diagonal.data_ptr()))
    CORE.pivot_factors(
        [_matrix(weight) for weight in weights],
        [chosen.tolist() for chosen in pivots],
        outputs,
        torch.get_num_threads(),
        report,
    )
    return results


def _matrix(weight: Tensor) -> tuple[int, int, int, int, int, int]:
    return (weight.data_ptr(), _DTYPES[weight.dtype], *weight.shape, *weight.stride())
