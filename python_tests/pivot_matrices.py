"""Matrices that pivoting gets wrong in different ways, and LAPACK's answer for them."""

from __future__ import annotations

import functools

import scipy.linalg
import torch
from torch import Tensor


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _spectrum(n: int) -> Tensor:
    left, right = torch.linalg.qr(gaussian(n, n, 1)).Q, torch.linalg.qr(gaussian(n, n, 2)).Q
    return left * torch.logspace(0, -12, n, dtype=torch.float64) @ right


def _near_duplicates(n: int, distance: float) -> Tensor:
    matrix = gaussian(n, n, 3)
    matrix[:, n // 2 :] = matrix[:, : n // 2] + distance * gaussian(n, n // 2, 4)
    return matrix


def _scaled(n: int) -> Tensor:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    return gaussian(n, n, 5) * torch.logspace(0, -12, n, dtype=torch.float64)[order]


def _zero_column(n: int) -> Tensor:
    matrix = gaussian(n, n, 6)
    matrix[:, 5] = 0
    return matrix


@functools.cache
def matrices(n: int = 320) -> dict[str, Tensor]:
    """fp64 matrices by name; the sizes are such that each takes several blocks of pivots."""
    return {
        "gaussian": gaussian(n, n),
        "heavy_tailed": gaussian(n, n, 7) / gaussian(n, n, 8).abs() ** 1.5,
        "geometric_spectrum": _spectrum(n),
        "near_duplicates": _near_duplicates(n, 1e-4),
        "nearer_duplicates": _near_duplicates(n, 1e-8),
        "zero_column": _zero_column(n),
        "twelve_decades": _scaled(n),
        "rank_100": gaussian(n, 100, 9) @ gaussian(100, n, 10),
        "wide": gaussian(n // 2, 3 * n, 11),
        "tall": gaussian(3 * n, n // 2, 12),
        "transposed": gaussian(n, n, 13).T,
        "strided": gaussian(2 * n, 2 * n, 14)[::2, 1::2],
    }


def lapack(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Pivots and |R_ii| of dgeqp3 for the exact values of ``matrix``."""
    r, pivots = scipy.linalg.qr(matrix.double().numpy(), mode="r", pivoting=True)
    diagonal = torch.from_numpy(r).diagonal().abs()
    return torch.from_numpy(pivots).long()[: len(diagonal)], diagonal


def assert_greedy(pivots: Tensor, matrix: Tensor, rtol: float = 1e-9) -> None:
    """``pivots`` are dgeqp3's, or leave them at a tie: two norms equal within ``rtol``.

    After a tie both orders are right, so each later pivot only has to be a largest column itself.
    """
    expected, diagonal = lapack(matrix)
    same = pivots == expected[: len(pivots)]
    if bool(same.all()):
        return
    first = int((~same).to(torch.int8).argmax())
    basis = torch.linalg.qr(matrix.double()[:, pivots]).Q
    left = matrix.double() - basis[:, :first] @ (basis[:, :first].mT @ matrix.double())
    for step in range(first, len(pivots)):
        norms = left.norm(dim=0)
        chosen, largest = float(norms[pivots[step]]), float(norms.max())
        floor = 1e-14 * float(matrix.double().norm(dim=0).max())
        if chosen < largest * (1 - rtol) - floor:
            raise AssertionError(
                f"pivot {step} is column {int(pivots[step])} of norm {chosen}, the largest is "
                f"{largest}; dgeqp3 took {int(expected[step])} of |R_ii| = {float(diagonal[step])}"
            )
        left -= basis[:, step, None] * (basis[:, step] @ left)
