"""What one adapted layer keeps for backward, its peak in a step, and the adapter on disk."""

from __future__ import annotations

from dataclasses import replace

from ..memory import disk_bytes, peak_bytes, saved_bytes
from ..problem import LayerProblem
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

    def step() -> None:
        y = runner.forward(x)
        runner.gradients(y, x, problem.dy.to(y.dtype))

    found = {
        "saved": saved_bytes(lambda: runner.forward(x), x),
        "peak": peak_bytes(step, x.device.type),
    }
    if runner.save is not None:
        found["disk"] = disk_bytes(runner.save)
    return found
