"""The usual table: variants of a method, each on several tasks and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from .cell import Cell
from .records import Run
from .scale import Scale
from .table import NOT_AT_HAND, Line, TrainedTable

NO_ROWS = "no rows yet"


@dataclass(frozen=True)
class Variant:
    """A line of a table: a method and the fields of its cells."""

    label: str
    adapter: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    paper: str = NOT_AT_HAND  # what the paper has in its place


@dataclass(frozen=True)
class Grid:
    """Every variant on every task, seeds outermost and variants innermost."""

    variants: Callable[[Scale], Sequence[Variant]]
    tasks: tuple[str, ...]
    seeds: int = 3

    def pairs(self, scale: Scale) -> list[tuple[Variant, Cell]]:
        return [
            (variant, scale.cell(variant.adapter, task, seed, **variant.fields))
            for seed in scale.of_seeds(self.seeds)
            for task in scale.of_tasks(self.tasks)
            for variant in self.variants(scale)
        ]

    def cells(self, scale: Scale) -> list[Cell]:
        return [cell for _, cell in self.pairs(scale)]

    def by_variant(self, scale: Scale, runs: Iterable[Run]) -> list[tuple[Variant, list[Run]]]:
        """The runs of each variant that has any."""
        known = {run.cell.digest(): run for run in runs}
        own: dict[str, list[Run]] = {}
        for variant, cell in self.pairs(scale):
            if cell.digest() in known:
                own.setdefault(variant.label, []).append(known[cell.digest()])
        return [(v, own[v.label]) for v in self.variants(scale) if v.label in own]

    def lines(self, scale: Scale, runs: Sequence[Run]) -> list[Line]:
        """The score of the last epoch on each task."""
        return [
            {
                "variant": variant.label,
                "paper": variant.paper,
                "trained": trained(own),
                **{task: spread(of_task(own, task)) for task in scale.of_tasks(self.tasks)},
            }
            for variant, own in self.by_variant(scale, runs)
        ]


def grid_table(grid: Grid, **rest: Any) -> TrainedTable:
    """A table of the last scores of a grid, unless ``rest`` says how else its lines come."""
    return TrainedTable(**{"cells": grid.cells, "lines": grid.lines, **rest})


def of_task(runs: Iterable[Run], task: str) -> list[Run]:
    return [run for run in runs if run.cell.task == task]


def last_scores(runs: Iterable[Run]) -> list[float]:
    """Of those that did not diverge."""
    return [run.score for run in runs if run.score is not None]


def trained(runs: Iterable[Run]) -> str:
    """Numbers that train; a range where a rank rule finds other ranks in another base."""
    counts = sorted({run.record["trained"] for run in runs if run.score is not None})
    return " … ".join(f"{count:,}" for count in dict.fromkeys([*counts[:1], *counts[-1:]]))


def spread(runs: Sequence[Run]) -> str:
    """Mean ± standard deviation over the seeds, and how many there are."""
    if not runs:
        return NO_ROWS
    scores = last_scores(runs)
    diverged = len(runs) - len(scores)
    if not scores:
        return f"diverged ({diverged})"
    deviation = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
    note = f", {diverged} diverged" if diverged else ""
    return f"{mean(scores):.3f}{deviation} ({len(scores)}{note})"
