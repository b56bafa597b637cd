"""Time to start: from one pretrained weight to the factors of an adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..competitors import Start, starts_for
from ..competitors.registry import require
from ..competitors.starts import FLOOR
from ..gate import Verdict
from ..problem import Unavailable
from ..registry import DTYPES, Case
from ..rows import OK, OTHER, RED, SKIPPED, Row, with_ratios
from ..timing import Task
from .common import Options, timed_rows

SETTLE = 0.15  # so long OpenBLAS, in which scipy computes, keeps its threads spinning
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 5e-3, "fp64": 1e-9}


def run(case: Case, options: Options) -> list[Row]:
    """Rows of every start at one shape, over one product QᵀW, which any start must at least do."""
    weight = draw_weight(case.n, case.k, case.dtype, options.device)
    expected: dict[str, Tensor] = {}
    built: list[tuple[Row, Task]] = []
    skipped: list[Row] = []
    for start in starts_for(options.variants):
        row = row_for("start", start, case, options)
        try:
            prepared = _prepare(start, weight, case, options)
            row = _gated(start, start.run(prepared, case.r), weight, case, expected, row)
        except Unavailable as reason:
            skipped.append(replace(row, status=SKIPPED, note=str(reason)))
            continue
        built.append((row, _task(start, prepared, case.r)))
    if options.gate_only:
        return [replace(row, metric="gate", unit="", value=row.gate) for row, _ in built] + skipped
    timed = timed_rows(built, options, m=1 << 30, warmed=True, settle=SETTLE)
    return with_ratios(timed, FLOOR) + skipped


def draw_weight(n: int, k: int, dtype: str, device: str, seed: int = 0) -> Tensor:
    """W [N, K] with a decaying spectrum, as pretrained weights have: σ_i ~ i^(-1/2)."""
    generator = torch.Generator().manual_seed(seed)
    side = min(n, k)
    left = torch.randn(n, side, generator=generator)
    right = torch.randn(side, k, generator=generator)
    scale = torch.arange(1, side + 1).rsqrt() / k**0.5
    return ((left * scale) @ right).to(device, DTYPES[dtype])


def row_for(suite: str, start: Start, case: Case, options: Options) -> Row:
    """A start's row before anything is measured."""
    return Row(
        suite,
        start.name,
        "start",
        adapter=start.family,
        n=case.n,
        k=case.k,
        r=case.r,
        dtype=case.dtype,
        device=options.device,
        cache=options.cache,
    )


def _prepare(start: Start, weight: Tensor, case: Case, options: Options) -> Any:
    require(start.needs)
    if options.device not in start.devices:
        raise Unavailable(f"runs on {' and '.join(start.devices)} only")
    if options.device == "cpu" and not options.full and min(case.n, case.k) > start.largest:
        raise Unavailable(f"takes long above {start.largest}: only with --full")
    return start.prepare(weight, case.r)


def _task(start: Start, prepared: Any, rank: int) -> Task:
    return {"start": lambda _: start.run(prepared, rank)}


def _gated(
    start: Start, result: Any, weight: Tensor, case: Case, expected: dict[str, Tensor], row: Row
) -> Row:
    if start.family not in ("qr", "svd"):
        return replace(row, status=OK if start.family == "floor" else OTHER)
    if start.family not in expected:
        expected[start.family] = _expected(start.family, weight, case.r)
    check = check_qr if start.family == "qr" else _check_svd
    verdict = check(result, weight.double(), expected[start.family], TOLERANCE[case.dtype])
    status = OK if verdict.ok else RED
    return replace(row, status=status, gate=verdict.excess, note=verdict.detail)


def _expected(family: str, weight: Tensor, rank: int) -> Tensor:
    """The first |R_ii| of greedy pivoting, or singular values, in fp64."""
    weight = weight.double()
    if family == "svd":
        return torch.linalg.svdvals(weight)[:rank]
    norms2, basis, diagonal = weight.square().sum(0), weight[:, :0], []
    for _ in range(rank):
        pivot = int(norms2.argmax())
        q = weight[:, pivot]
        for _ in range(2):  # twice is enough
            q = q - basis @ (basis.mT @ q)
        diagonal.append(q.norm())
        q = q / diagonal[-1]
        basis = torch.cat([basis, q[:, None]], 1)
        norms2 = norms2 - (q @ weight).square()  # tails here stay far above what cancels
        norms2[pivot] = -1.0
    return torch.stack(diagonal)


def check_qr(
    result: tuple[Tensor, Tensor, Tensor], weight: Tensor, diagonal: Tensor, tolerance: float
) -> Verdict:
    """Orthonormal q, r = qᵀW, and |R_ii| as greedy pivoting in fp64 gives it."""
    q, r, pivots = (t.to(weight.device) for t in result)
    q, r = q.double(), r.double()
    eye = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
    return _verdict(
        tolerance,
        orthogonality=float((q.mT @ q - eye).abs().max()),
        projection=float((q.mT @ weight - r).norm() / r.norm()),
        diagonal=float(((r[:, pivots].diagonal().abs() - diagonal) / diagonal).abs().max()),
    )


def _check_svd(
    result: tuple[Tensor, Tensor, Tensor], weight: Tensor, values: Tensor, tolerance: float
) -> Verdict:
    """Singular values, and the triplets' residual, relative to σ_1."""
    u, s, vh = (t.double() for t in result)
    return _verdict(
        2 * tolerance,
        values=float((s - values).abs().max() / values[0]),
        residual=float((weight @ vh.mT - u * s).norm(dim=0).max() / values[0]),
    )


def _verdict(tolerance: float, **errors: float) -> Verdict:
    name, worst = max(errors.items(), key=lambda item: item[1])
    excess = worst / tolerance
    ok = excess <= 1.0
    return Verdict(ok, excess, "" if ok else f"{name} is off by {worst:.3g}")
