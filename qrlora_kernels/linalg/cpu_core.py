"""Calls of the compiled CPU core: a whole list of matrices at a time, without the GIL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..native import CORE, pointers
from .blocked import BLOCK
from .jobs import CORE_DTYPES, Factors, Job, Pivots, Report

# As enum RankRule of csrc/core/include/qrlora/cpu/pivoted_qr.h.
_RULES = {None: 0, "magnitude": 1, "energy": 2, "abs_sum": 3}

Array = npt.NDArray[np.uint8]


def handles(weight: Tensor) -> bool:
    """The core is there and the matrix is on the CPU."""
    return CORE is not None and weight.device.type == "cpu"


def search(
    jobs: Sequence[Job],
    report: Report,
    rule: str | None = None,
    tau: float = 0.0,
    max_rank: int = 1,
    factors: bool = True,
) -> list[tuple[Pivots | None, Factors | None]]:
    """Greedy pivots of each CPU matrix, None for one that is not finite, and their factors.

    Parameters
    ----------
    rule : str or None
        "magnitude" stops at its rank, "energy" and "abs_sum" where theirs is bracketed or known to
        reach ``max_rank``.
    factors : bool
        Make them. There are none all the same where a rule did not stop below
        :func:`keeps_residual`.
    """
    if not jobs:
        return []
    assert CORE is not None
    # Held until the core returns: they may be copies.
    weights = [pointers.checked(job.weight, "a matrix") for job in jobs]
    found = CORE.pivot_search(
        [_matrix(weight) for weight in weights],
        [job.limit for job in jobs],
        _RULES[rule],
        tau,
        max_rank,
        BLOCK,
        [CORE_DTYPES[job.dtype] for job in jobs] if factors else None,
        torch.get_num_threads(),
        report,
    )
    results: list[tuple[Pivots | None, Factors | None]] = []
    for job, (columns, norms, bounds, deficient, finite, made) in zip(jobs, found, strict=True):
        if not finite:
            results.append((None, None))
            continue
        pivots = Pivots(
            torch.tensor(columns, dtype=torch.int64),
            torch.tensor(norms, dtype=torch.float64),
            torch.tensor(bounds, dtype=torch.float64),
            deficient,
        )
        results.append((pivots, _factors(made, job.dtype) if made and columns else None))
    return results


def keeps_residual(weight: Tensor, limit: int) -> bool:
    """Whether a search for ``limit`` pivots keeps a residual of the whole matrix in fp64.

    Factors of searches that differ in this agree to rounding, but not in every bit.
    """
    assert CORE is not None
    return bool(limit > CORE.EXPLICIT_LIMIT * min(weight.shape))


def _factors(made: tuple[Array, Array, list[float]], dtype: torch.dtype) -> Factors:
    """The core's bytes as tensors q [N, r] and r [r, K], without a copy."""
    q, r, diagonal = made
    return (
        torch.from_numpy(q).view(dtype).view(-1, len(diagonal)),
        torch.from_numpy(r).view(dtype).view(len(diagonal), -1),
        torch.tensor(diagonal, dtype=torch.float64),
    )


def _matrix(weight: Tensor) -> tuple[int, int, int, int, int, int]:
    return (pointers.address(weight), CORE_DTYPES[weight.dtype], *weight.shape, *weight.stride())
