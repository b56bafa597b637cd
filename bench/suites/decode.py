"""One adapted layer in generation: a few tokens, no gradients."""

from __future__ import annotations

from typing import Any

import torch

from ..problem import LayerProblem
from ..registry import Case
from ..rows import Row, with_ratios
from ..timing import Task
from .common import FLOOR, Built, Options, build_all, gate_rows, timed_rows


def run(case: Case, options: Options) -> list[Row]:
    """Rows of every variant at one shape."""
    problem, built, skipped = build_all("decode", case, options)
    if options.gate_only:
        return gate_rows(built) + skipped
    rows = timed_rows([(b.row, _generation(b, problem)) for b in built], options, case.m)
    return with_ratios(rows, FLOOR) + skipped


def _generation(built: Built, problem: LayerProblem) -> Task:
    runner, x = built.runner, problem.x.detach()

    def forward(_: Any) -> Any:
        with torch.no_grad():
            return runner.forward(x)

    return {"forward": forward}
