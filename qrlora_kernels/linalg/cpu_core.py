"""Calls of the compiled CPU core: a whole list of matrices at a time, without the GIL."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..native import CORE, pointers
from .blocked import Pivots

# As enum DType of csrc/include/qrlora/dtype.h and enum RankRule of qrlora/cpu/pivoted_qr.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_RULES = {None: 0, "magnitude": 1, "energy": 2, "abs_sum": 3}
BLOCK = 128

Array = npt.NDArray[np.uint8]
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
    dtypes: Sequence[torch.dtype] | None,
    report: Report,
) -> list[tuple[Pivots | None, Factors | None]]:
    """Greedy pivots of each CPU matrix, None for one that is not finite, and their factors.

    Parameters
    ----------
    limits : sequence of int
        Most pivots of each matrix.
    rule : str or None
        "magnitude" stops at its rank, "energy" and "abs_sum" where theirs is bracketed or known to
        reach ``max_rank``.
    dtypes : sequence of torch.dtype or None
        Those of the factors; None: no factors. There are none either where a rule did not stop
        below :func:`keeps_residual`.
    report : callable
        Called with the number of matrices done; an exception from it ends the search.
    """
    assert CORE is not None
    # Held until the core returns: they may be copies.
    weights = [pointers.checked(weight, "a matrix") for weight in weights]
    found = CORE.pivot_search(
        [_matrix(weight) for weight in weights],
        list(limits),
        _RULES[rule],
        tau,
        max_rank,
        BLOCK,
        None if dtypes is None else [_DTYPES[dtype] for dtype in dtypes],
        torch.get_num_threads(),
        report,
    )
    results: list[tuple[Pivots | None, Factors | None]] = []
    for i, (columns, norms, bounds, deficient, finite, factors) in enumerate(found):
        if not finite:
            results.append((None, None))
            continue
        pivots = Pivots(
            torch.tensor(columns, dtype=torch.int64),
            torch.tensor(norms, dtype=torch.float64),
            torch.tensor(bounds, dtype=torch.float64),
            deficient,
        )
        made = None
        if dtypes is not None and factors is not None and len(columns) > 0:
            made = _factors(factors, weights[i], dtypes[i])
        results.append((pivots, made))
    return results


def keeps_residual(weight: Tensor, limit: int) -> bool:
    """Whether a search for ``limit`` pivots keeps a residual of the whole matrix in fp64.

    Factors of searches that differ in this agree to rounding, but not in every bit.
    """
    assert CORE is not None
    return bool(limit > CORE.EXPLICIT_LIMIT * min(weight.shape))


def _factors(made: tuple[Array, Array, list[float]], weight: Tensor, dtype: torch.dtype) -> Factors:
    """The core's bytes as tensors q [N, r] and r [r, K], without a copy."""
    q, r, diagonal = made
    rows, columns = weight.shape
    return (
        torch.from_numpy(q).view(dtype).view(rows, len(diagonal)),
        torch.from_numpy(r).view(dtype).view(len(diagonal), columns),
        torch.tensor(diagonal, dtype=torch.float64),
    )


def _matrix(weight: Tensor) -> tuple[int, int, int, int, int, int]:
    return (pointers.address(weight), _DTYPES[weight.dtype], *weight.shape, *weight.stride())
