"""Greedy column pivots of a matrix, found block by block without updating the matrix.

The order is exactly that of LAPACK's geqp3 (Businger-Golub: always the column with the largest
residual norm), but the matrix is read once per block of pivots instead of once per pivot:

1. Every column carries an upper bound of its residual norm². The c columns with the largest bounds
   are the candidates; their residuals are computed explicitly in fp64.
2. Pivots are chosen among the candidates alone, by a pivoted Cholesky of their Gram matrix. One is
   accepted only while its norm is at least the largest bound outside the candidates. Norms only
   shrink, so an accepted pivot is the pivot geqp3 would have taken.
3. One pass R_b = Q_bᵀ W over the matrix lowers all bounds by the accepted directions.

Passes may run in fp32: their rounding is added to the bounds, so it can cost a shorter block but
never the order. Where the bounds become too loose to certify a pivot, the columns that still
compete are recomputed in fp64 and later passes run in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .jobs import Pivots
from .products import column_norms2, panel_width, project, work_dtype

EPS64 = torch.finfo(torch.float64).eps
BLOCK = 128  # candidates at a time
# Norms² this close count as tied; a tie goes to the lowest column index.
TIE = 1e-13
# A column whose residual is below this many roundings of its noise is dependent on the pivots.
DEPENDENT = 64 * EPS64
# Rounding of a norm² in a Gram, relative to it, which stays when others are taken out of it.
GRAM_ERROR = 16 * EPS64
# Inside a block a norm² may fall to this part of its start before fp64 cancellation matters.
BLOCK_DROP = 1e-4

StopTest = Callable[[Tensor, Tensor], bool]
Array = npt.NDArray[np.float64]


@dataclass
class _State:
    weight: Tensor
    limit: int
    start2: Tensor  # norms² of the whole columns
    norm2: Tensor  # estimated residual norms²
    slack: Tensor  # bound of the error of norm2
    noise2: Tensor  # squared scale that a column's rounding is relative to
    alive: Tensor  # neither a pivot nor dependent on the pivots
    q: Tensor  # [N, limit] fp64, one column filled per pivot
    pass_dtype: torch.dtype
    columns: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    filled: int = 0  # columns of q

    @property
    def bounds(self) -> Tensor:
        return (self.norm2 + self.slack).masked_fill_(~self.alive, -torch.inf)

    @property
    def basis(self) -> Tensor:
        return self.q[:, : self.filled]


def greedy_pivots(weight: Tensor, limit: int, tau: float | None, stop: StopTest | None) -> Pivots:
    """First ``limit`` greedy pivots of ``weight`` [N, K].

    Parameters
    ----------
    tau : float or None
        Stop before the first pivot whose norm is not above ``tau`` times the first one's.
    stop : callable or None
        Called after each block with the norms [k] of the pivots and the bounds [K]; True ends.
    """
    start2 = column_norms2(weight)
    state = _State(
        weight=weight,
        limit=limit,
        start2=start2,
        norm2=start2.clone(),
        slack=4 * EPS64 * start2,
        noise2=start2.clone(),
        alive=start2 > 0,
        q=torch.empty(weight.shape[0], limit, dtype=torch.float64, device=weight.device),
        pass_dtype=work_dtype(weight),
    )
    fresh = deficient = False
    while len(state.columns) < limit:
        deficient = not bool(state.alive.any())
        if deficient:
            break
        outcome = _block(state, tau, fresh)
        fresh = outcome == "refresh"
        if outcome == "below_tau":
            break
        if stop is not None and not fresh and stop(_fp64(state.norms), state.bounds.clamp_(min=0)):
            break
    return Pivots(
        columns=torch.tensor(state.columns, dtype=torch.int64, device=weight.device),
        norms=_fp64(state.norms).to(weight.device),
        bounds=state.bounds.clamp_(min=0),
        deficient=deficient,
    )


def _block(state: _State, tau: float | None, fresh: bool) -> str:
    """Accept one block of pivots; returns "more", "refresh" or "below_tau"."""
    chosen, outside = _candidates(state)
    residual = state.weight[:, chosen].double()
    residual -= state.basis @ (state.basis.mT @ residual)
    gram = residual.mT @ residual
    search = _pivot_block(
        gram.cpu().numpy(),
        chosen.cpu().numpy(),
        room=state.limit - len(state.columns),
        outside=outside,
        alive=(gram.diagonal() > DEPENDENT**2 * state.noise2[chosen]).cpu().numpy(),
        floor2=0.0 if tau is None or not state.norms else (tau * state.norms[0]) ** 2,
        tau=tau,
        certify_first=not fresh,
    )
    if search.outcome == "refresh":
        _refresh(state, max(float(search.left2.max()), 0.0))
    elif search.accepted:
        state.columns += chosen[search.accepted].tolist()
        state.norms += [value**0.5 for value in search.norms2]
        # After the last block nothing reads the bounds any more.
        if search.outcome == "more" and len(state.columns) < state.limit:
            _take(state, chosen, residual[:, search.accepted], search)
    else:
        state.alive[chosen] = False
    return search.outcome


def _candidates(state: _State) -> tuple[Tensor, tuple[float, int]]:
    """Candidate columns in ascending order, the largest bound outside and its lowest column."""
    bounds = state.bounds
    free = int(state.alive.sum())
    order = torch.sort(bounds, descending=True, stable=True)
    chosen = order.indices[: min(BLOCK, free)].sort().values
    if free <= BLOCK:
        return chosen, (-np.inf, bounds.numel())
    outside = float(order.values[BLOCK])
    tied = order.indices[BLOCK:][order.values[BLOCK:] >= outside * (1 - TIE)]
    return chosen, (outside, int(tied.min()))


@dataclass
class _Search:
    accepted: list[int]
    norms2: list[float]
    known2: Array  # norms² of the candidates, and what the accepted ones left of them
    left2: Array
    factor: Array  # [c, accepted] of the pivoted Cholesky
    outcome: str

    def inverse_factor(self) -> Tensor:
        """inverse(L)ᵀ for the rows of the factor that were accepted."""
        lower = torch.from_numpy(self.factor[self.accepted, : len(self.accepted)])
        unit = torch.eye(len(lower), dtype=torch.float64)
        return torch.linalg.solve_triangular(lower, unit, upper=False).mT


def _pivot_block(
    gram: Array,
    columns: npt.NDArray[np.int64],
    *,
    room: int,
    outside: tuple[float, int],
    alive: npt.NDArray[np.bool_],
    floor2: float,
    tau: float | None,
    certify_first: bool,
) -> _Search:
    """Pivoted Cholesky of the candidates' Gram [c, c], as long as every pivot is certified."""
    size = len(columns)
    start = gram.diagonal().copy()
    left = np.where(alive, start, -np.inf)
    factor = np.empty((size, min(room, size)))
    found = _Search([], [], start, left, factor, "more")
    for step in range(min(room, size)):
        best = left.max()
        at = int(np.argmax(left >= best * (1 - TIE)))  # columns ascend: the lowest index wins
        value = float(left[at])
        if (step > 0 or certify_first) and not _certified(value, columns[at], outside):
            found.outcome = "more" if step > 0 else "refresh"
            return found
        if value == -np.inf or value < BLOCK_DROP * start[at]:
            return found
        if floor2 and value <= floor2:
            found.outcome = "below_tau"
            return found
        if tau is not None and not floor2:
            floor2 = tau * tau * value
        column = gram[:, at] - factor[:, :step] @ factor[at, :step]
        column /= np.sqrt(value)
        factor[:, step] = column
        left -= column * column
        left[at] = -np.inf
        found.accepted.append(at)
        found.norms2.append(value)
    return found


def _certified(value: float, column: int, outside: tuple[float, int]) -> bool:
    """No column outside the candidates can be ahead of this one."""
    bound, index = outside
    if value >= bound * (1 + TIE):
        return True
    return value >= bound * (1 - TIE) and column < index


def _take(state: _State, chosen: Tensor, residual: Tensor, search: _Search) -> None:
    """Orthonormalise the accepted residuals, make the pass over the matrix, lower the bounds."""
    count = len(search.accepted)
    basis = residual @ search.inverse_factor().to(residual.device)
    basis -= state.basis @ (state.basis.mT @ basis)
    lower = torch.linalg.cholesky(basis.mT @ basis)
    basis = torch.linalg.solve_triangular(lower.mT, basis, upper=True, left=False)
    state.filled += count
    state.basis[:, -count:] = basis
    taken = chosen[search.accepted]
    norms2 = _fp64(search.norms2).to(chosen.device)

    rows2 = project(basis.to(state.pass_dtype), state.weight).double().square_()
    lowered = rows2.sum(0)
    growth = state.start2[taken] / norms2
    state.noise2 += growth @ rows2
    # |r + e|² differs from |r|² by at most 2|r||e| + |e|², with e the rounding of this pass.
    unit = 8 * torch.finfo(state.pass_dtype).eps * count**0.5
    error = unit * state.start2.sqrt()
    state.norm2 = (state.norm2 - lowered).clamp_(min=0)
    state.slack += 2 * lowered.sqrt() * error + error**2 + 4 * EPS64 * state.norm2
    left2 = torch.from_numpy(search.left2).to(chosen.device)
    error2 = GRAM_ERROR * torch.from_numpy(search.known2).to(chosen.device)
    _set_exact(state, chosen, left2.clamp(min=0))
    state.slack[chosen] += error2
    # What rounding may have hidden is computed again before it counts as nothing.
    state.alive[chosen] = left2 + error2 > DEPENDENT**2 * state.noise2[chosen]
    state.alive[taken] = False


def _set_exact(state: _State, columns: Tensor, norm2: Tensor) -> None:
    """Enter norms² that were computed in fp64."""
    error = 8 * EPS64 * state.noise2[columns].sqrt()
    state.norm2[columns] = norm2
    state.slack[columns] = 2 * norm2.sqrt() * error + error**2


def _refresh(state: _State, known2: float) -> None:
    """Recompute in fp64 the norms of all columns whose bound reaches ``known2``."""
    state.pass_dtype = torch.float64
    competing = torch.nonzero(state.bounds >= known2 * (1 - TIE)).flatten()
    for columns in torch.split(competing, panel_width(state.weight, torch.float64)):
        part = state.weight[:, columns].double()
        part -= state.basis @ (state.basis.mT @ part)
        norm2 = part.square_().sum(0)
        _set_exact(state, columns, norm2)
        state.alive[columns] = norm2 > DEPENDENT**2 * state.noise2[columns]


def _fp64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
