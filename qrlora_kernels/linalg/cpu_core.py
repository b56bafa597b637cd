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
    return _search(weights, limits, (_RULES[rule], tau, max_rank), [], report)


def keeps_residual(weight: Tensor, limit: int) -> bool:
    """Whether a search for ``limit`` pivots keeps a residual of the whole matrix in fp64.

    Factors of searches that differ in this agree to rounding, but not in every bit.
    """
    assert CORE is not None
    return bool(limit > CORE.EXPLICIT_LIMIT * min(weight.shape))


def factorise(
    weights: Sequence[Tensor],
    limits: Sequence[int],
    dtypes: Sequence[torch.dtype],
    report: Report,
) -> list[tuple[Pivots | None, Factors]]:
    """Pivots as :func:`search` finds them without a rule, and their factors from the same work."""
    results = [
        _empty(weight, limit, dtype)
        for weight, limit, dtype in zip(weights, limits, dtypes, strict=True)
    ]
    outputs = [_addresses(one) for one in results]
    found = _search(weights, limits, (_RULES[None], 0.0, 1), outputs, report)
    for i, (one, (q, r, diagonal)) in enumerate(zip(found, results, strict=True)):
        if one is not None and (rank := len(one.columns)) < len(diagonal):
            results[i] = (q[:, :rank].contiguous(), r[:rank].clone(), diagonal[:rank].clone())
    return list(zip(found, results, strict=True))


def _search(
    weights: Sequence[Tensor],
    limits: Sequence[int],
    stop: tuple[int, float, int],
    outputs: Sequence[tuple[int, int, int, int]],
    report: Report,
) -> list[Pivots | None]:
    assert CORE is not None
    found = CORE.pivot_search(
        [_matrix(weight) for weight in weights],
        list(limits),
        *stop,
        BLOCK,
        outputs,
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


def _empty(weight: Tensor, count: int, dtype: torch.dtype) -> Factors:
    rows, columns = weight.shape
    q = torch.empty(rows, count, dtype=dtype)
    r = torch.zeros(count, columns, dtype=dtype)
    return q, r, torch.empty(count, dtype=torch.float64)


def _addresses(factors: Factors) -> tuple[int, int, int, int]:
    q, r, diagonal = factors
    return q.data_ptr(), r.data_ptr(), _DTYPES[q.dtype], diagonal.data_ptr()


def _matrix(weight: Tensor) -> tuple[int, int, int, int, int, int]:
    return (weight.data_ptr(), _DTYPES[weight.dtype], *weight.shape, *weight.stride())
