"""Pivoted QR against LAPACK's, at every rank, on LLaMA's shapes, and over a list at once.

The gate is the pivots themselves: those of dgeqp3 on an fp64 copy, found in the same run.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import qrlora_kernels as qk

from .. import fresh
from ..competitors import Start, starts_for
from ..competitors.lapack import geqp3rk
from ..competitors.registry import require
from ..gate import Verdict
from ..problem import Unavailable
from ..registry import Case, PivotCase
from ..rows import OK, RED, SKIPPED, Row, with_ratios
from ..timing import Task
from .common import Options, timed_rows
from .start import SETTLE, TOLERANCE, check_qr, draw_weight, row_for

OURS = "qrlora_kernels pivoted_qr"
LOOP, LIST = "one call each", f"{OURS}, one call"
_WHOLE = "scipy geqp3"  # the whole factorisation, which takes minutes beyond a square of 4096


def run(case: PivotCase, options: Options) -> list[Row]:
    """Rows of one weight at all ranks, or of the list; scipy's one time stands for every rank."""
    if case.count > 1:
        return _list(case, options)
    starts = [s for s in starts_for(options.variants) if s.family == "qr"]
    weight = draw_weight(case.n, case.k, case.dtype, options.device)
    try:
        expected = _expected(weight, max(case.ranks))
    except Unavailable as reason:
        one = Case(0, case.n, case.k, max(case.ranks), case.dtype)
        skipped = [row_for("pivots", start, one, options) for start in starts]
        return [replace(row, status=SKIPPED, note=str(reason)) for row in skipped]
    built: list[tuple[Row, Task]] = []
    rows: list[Row] = []
    for start in starts:
        whole = start.name == _WHOLE
        ranks = (max(case.ranks),) if whole and not options.gate_only else case.ranks
        for rank in ranks:
            row = row_for("pivots", start, Case(0, case.n, case.k, rank, case.dtype), options)
            try:
                row, task = _gated(start, weight, rank, expected, row, case)
            except Unavailable as reason:
                rows.append(replace(row, status=SKIPPED, note=str(reason)))
                continue
            built.append((row, task))
    if options.gate_only:
        return [replace(row, metric="gate", unit="", value=row.gate) for row, _ in built] + rows
    timed = timed_rows(built, options, m=1 << 30, warmed=True, settle=SETTLE)
    timed += [
        replace(row, r=rank)
        for row in timed
        if row.variant == _WHOLE
        for rank in case.ranks
        if rank != row.r
    ]
    return timed + rows + _peaks(case, options)


def _gated(
    start: Start, weight: Tensor, rank: int, expected: Tensor, row: Row, case: PivotCase
) -> tuple[Row, Task]:
    require(start.needs)
    if weight.device.type not in start.devices:
        raise Unavailable(f"runs on {' and '.join(start.devices)} only")
    if start.name == _WHOLE and case.n != case.k:
        raise Unavailable("factorises the whole matrix: minutes at this size")
    prepared = start.prepare(weight, rank)
    verdict = check_pivots(start.run(prepared, rank), weight, expected[:rank], row)
    note = "" if verdict.ok else verdict.detail
    row = replace(row, status=OK if verdict.ok else RED, gate=verdict.excess, note=note)
    return row, {"start": lambda _: start.run(prepared, rank)}


def check_pivots(
    result: tuple[Tensor, Tensor, Tensor], weight: Tensor, expected: Tensor, row: Row
) -> Verdict:
    """The pivots of fp64, for this package one by one; LAPACK in fp32 may swap near ties."""
    pivots = result[2].to(expected.device)
    if len(pivots) < len(expected):
        return Verdict(False, float("inf"), f"{len(pivots)} pivots instead of {len(expected)}")
    if row.variant.startswith("qrlora_kernels") and not torch.equal(pivots, expected):
        first = int((pivots != expected).nonzero()[0, 0])
        return Verdict(False, float("inf"), f"pivot {first + 1} is not dgeqp3's")
    if len(pivots) == min(weight.shape):  # the last |R_ii| of a whole factorisation are rounding
        residual = _residual(result, weight) / TOLERANCE[row.dtype]
        return Verdict(residual <= 1.0, residual, f"the residual is {residual:.3g} of the allowed")
    # |R_ii| of the expected order: products of Householder norms, from a QR without pivoting.
    diagonal = torch.linalg.qr(weight[:, expected].double(), mode="r").R.diagonal().abs()
    return check_qr(result, weight.double(), diagonal, TOLERANCE[row.dtype])


def _residual(result: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> float:
    q, r = result[0].double(), result[1].double()
    return float((q @ r - weight.double()).norm() / weight.double().norm())


def _expected(weight: Tensor, rank: int) -> Tensor:
    """Pivots of LAPACK in fp64: dgeqp3, or its truncated dgeqp3rk where that is enough."""
    matrix = weight.double().cpu().numpy()
    if rank < min(weight.shape):
        return torch.from_numpy(geqp3rk(matrix, rank)[2]).to(weight.device)
    require(("scipy",))
    import scipy.linalg

    pivots = scipy.linalg.qr(matrix, mode="r", pivoting=True)[1]
    return torch.from_numpy(pivots).long().to(weight.device)


def _peaks(case: PivotCase, options: Options) -> list[Row]:
    """Memory beyond the weight and what the process had, for weights in half precision."""
    if case.dtype != "bf16" or options.device != "cpu":
        return []
    one = Case(0, case.n, case.k, case.ranks[0], case.dtype)
    (start,) = [s for s in starts_for() if s.name == OURS]
    found = fresh.peak("start", OURS, one)
    row = row_for("pivots", start, one, options)
    if found is None:
        return []
    return [replace(row, metric="peak", unit="B", clock="", value=float(found))]


def _list(case: PivotCase, options: Options) -> list[Row]:
    """All weights in one call over the same calls in a loop, with the same bits as result."""
    rank, base = case.ranks[0], Row("pivots", LOOP, "start", model=str(case))
    weights = [
        draw_weight(case.n, case.k, case.dtype, options.device, seed) for seed in range(case.count)
    ]
    together = qk.linalg.pivoted_qr(weights, rank)
    alone = [qk.linalg.pivoted_qr(weight, rank) for weight in weights]
    same = all(map(torch.equal, (f.r for f in together), (f.r for f in alone)))
    verdict = OK if same else RED
    base = replace(base, dtype=case.dtype, device=options.device, cache=options.cache)
    ours = replace(base, variant=LIST, adapter="qr", r=rank, status=verdict, gate=float(not same))
    if options.gate_only:
        return [replace(ours, metric="gate", unit="", value=ours.gate)]

    def loop(_: object) -> None:
        for weight in weights:
            qk.linalg.pivoted_qr(weight, rank)

    tasks: list[tuple[Row, Task]] = [
        (base, {"start": loop}),
        (ours, {"start": lambda _: qk.linalg.pivoted_qr(weights, rank)}),
    ]
    return with_ratios(timed_rows(tasks, options, m=1 << 30, warmed=True), LOOP)
