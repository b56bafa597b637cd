"""A table of a paper: the cells that it needs, and how its lines follow from their records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from .cell import Cell
from .records import Run
from .scale import Scale

NOT_AT_HAND = "not at hand"
NO_ROWS = "no rows yet"
Line = dict[str, str]  # by column


@dataclass(frozen=True)
class Variant:
    """A line of a table before tasks and seeds: a method and the fields of its cell."""

    label: str
    adapter: str
    paper: str = NOT_AT_HAND  # what the paper has in its place
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """What is common to tables whose lines come from training.

    ``cells`` come in the order in which they are to be run: a prefix is a fair comparison.
    """

    name: str
    paper: str  # and where in it
    title: str
    about: str
    not_shown: str
    cells: Callable[[Scale], Sequence[Cell]]
    lines: Callable[[Scale, Sequence[Run]], list[Line]]


def grid(
    scale: Scale, variants: Sequence[Variant], tasks: Sequence[str], seeds: int
) -> Iterator[tuple[Variant, Cell]]:
    """Every variant on every task, seeds outermost."""
    for seed in scale.of_seeds(seeds):
        for task in scale.of_tasks(tasks):
            for variant in variants:
                yield variant, scale.cell(variant.adapter, task, seed, **variant.fields)


def grid_table(
    variants: Callable[[Scale], Sequence[Variant]], tasks: Sequence[str], seeds: int, **about: str
) -> Table:
    """A table with a line for each variant and its score on each of the tasks."""

    def columns(scale: Scale) -> tuple[str, ...]:
        return scale.of_tasks(tasks)

    def cells(scale: Scale) -> list[Cell]:
        return [cell for _, cell in grid(scale, variants(scale), tasks, seeds)]

    def lines(scale: Scale, runs: Sequence[Run]) -> list[Line]:
        by_digest = {run.cell.digest(): run for run in runs}
        own: dict[tuple[str, str], list[Run]] = {}
        for variant, cell in grid(scale, variants(scale), tasks, seeds):
            if cell.digest() in by_digest:
                own.setdefault((variant.label, cell.task), []).append(by_digest[cell.digest()])
        known = {label for label, _ in own}
        return [
            _line(variant, {task: own.get((variant.label, task), []) for task in columns(scale)})
            for variant in variants(scale)
            if variant.label in known
        ]

    return Table(cells=cells, lines=lines, **about)


def _line(variant: Variant, by_task: Mapping[str, Sequence[Run]]) -> Line:
    runs = [run for runs in by_task.values() for run in runs]
    return {
        "variant": variant.label,
        "paper": variant.paper,
        "trained": trained(runs),
        **{task: spread(own) for task, own in by_task.items()},
    }


def trained(runs: Sequence[Run]) -> str:
    """Numbers that train; a range where a rank rule finds other ranks in another base."""
    counts = sorted({run.record["trained"] for run in runs if "trained" in run.record})
    return " … ".join(f"{count:,}" for count in dict.fromkeys([*counts[:1], *counts[-1:]]))


def spread(runs: Sequence[Run]) -> str:
    """Mean ± standard deviation over the seeds, and how many there are."""
    if not runs:
        return NO_ROWS
    scores = [run.score for run in runs if run.score is not None]
    diverged = len(runs) - len(scores)
    note = f", {diverged} diverged" if diverged else ""
    if not scores:
        return f"diverged ({len(runs)})"
    deviation = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{mean(scores):.3f}{deviation} ({len(scores)}{note})"
