"""What a call costs beyond its arithmetic: a small layer, one token, the time of this thread."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from ..competitors import Layer, layers_for
from ..competitors.ours import operations
from ..problem import Runner
from ..registry import Case
from ..rows import Row, with_ratios
from ..timing import Timing, timing
from .common import FLOOR, Built, Options, build_all, gate_rows

_CALLS = 50  # in one sample


def run(case: Case, options: Options) -> list[Row]:
    """Microseconds a call of ``qrlora_kernels.functional``, the expression and ``F.linear``."""
    problem, built, skipped = build_all("overhead", case, options, _layers(options))
    if options.gate_only:
        return gate_rows(built) + skipped
    x = problem.x
    rows = [
        replace(row, metric=metric)
        for metric, given in (("no_grad", x.detach()), ("grad", x))
        for row in _timed(built, given, options, grad=metric == "grad")
    ]
    return with_ratios(rows, FLOOR) + skipped


def _layers(options: Options) -> list[Layer]:
    known = layers_for(options.adapters, options.variants)
    plain = [one for one in known if one.name in (FLOOR, "eager") and one.adapter != "lokr"]
    families = {one.adapter for one in known}
    return plain + [one for one in operations() if one.adapter in families]


def _timed(built: list[Built], x: Tensor, options: Options, grad: bool) -> list[Row]:
    """Forward calls only, with a graph for the backward where ``grad``."""
    runs: list[list[list[float]]] = []
    rounds = options.effort.max_rounds // 2
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            samples: list[list[float]] = [[] for _ in built]
            for _ in range(rounds):
                for one, times in zip(built, samples, strict=True):
                    times.append(_seconds_a_call(one.runner, x))
            options.tick(0.25)
            runs.append(samples)
    return [
        _row(one.row, timing(first, second))
        for one, first, second in zip(built, *runs, strict=True)
    ]


def _seconds_a_call(runner: Runner, x: Tensor) -> float:
    """Of this thread alone, so that other work on the machine is not counted."""
    call = runner.module
    call(x)
    begin = time.thread_time()
    for _ in range(_CALLS):
        call(x)
    return (time.thread_time() - begin) / _CALLS


def _row(row: Row, found: Timing) -> Row:
    """Milliseconds become microseconds."""
    return replace(
        row,
        clock="thread",
        unit="µs",
        **{name: 1e3 * getattr(found, name) for name in ("value", "q20", "q80", "first", "second")},
    )
