"""One adapted layer in training: forward, backward and both, over the frozen layer."""

from __future__ import annotations

from typing import Any

from ..problem import LayerProblem, Runner
from ..registry import Case
from ..rows import Row, with_ratios
from ..timing import Task
from .common import FLOOR, Options, build_all, gate_rows, timed_rows


def run(case: Case, options: Options) -> list[Row]:
    """Rows of every variant at one shape."""
    problem, built, skipped = build_all("layer", case, options)
    if options.gate_only:
        return gate_rows(built) + skipped
    rows = timed_rows([(b.row, training(b.runner, problem)) for b in built], options, case.m)
    return with_ratios(rows, FLOOR) + skipped


def training(runner: Runner, problem: LayerProblem) -> Task:
    """Forward, then the gradients of x and of every trainable."""
    dy = problem.dy.to(runner.forward(problem.x).dtype)

    def forward(_: Any) -> Any:
        return runner.forward(problem.x)

    return {"forward": forward, "backward": lambda y: runner.gradients(y, problem.x, dy)}
