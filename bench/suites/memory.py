"""What one adapted layer keeps for backward, its peak in a step, and the adapter on disk."""

from __future__ import annotations

from dataclasses import replace

from .. import fresh
from ..memory import disk_bytes, peak_bytes, saved_bytes
from ..problem import LayerProblem, training_step
from ..registry import Case
from ..rows import Row, with_ratios
from .common import FLOOR, Built, Options, build_all, gate_rows


def run(case: Case, options: Options) -> list[Row]:
    """Rows in bytes. The frozen layer keeps nothing, so only its peak makes a ratio."""
    problem, built, skipped = build_all("memory", case, options)
    if options.gate_only:
        return gate_rows(built) + skipped
    rows: list[Row] = []
    for one in built:
        for metric, value in _bytes(one, problem).items():
            rows.append(replace(one.row, metric=metric, value=float(value), unit="B", clock=""))
        options.tick(1 / len(built))
    return with_ratios(rows, FLOOR) + skipped


def _bytes(one: Built, problem: LayerProblem) -> dict[str, int]:
    runner, x = one.runner, problem.x
    found = {"saved": saved_bytes(lambda: runner.forward(x), x)}
    if x.is_cuda:
        peak = peak_bytes(training_step(runner, problem), "cuda")
    else:
        peak = fresh.peak("layer", one.layer.key, problem.case)
    if peak is not None:
        found["peak"] = peak
    if runner.save is not None:
        found["disk"] = disk_bytes(runner.save)
    return found
