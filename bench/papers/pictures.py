"""The figures, each drawn from the results of its table onto one pair of axes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any

from .grid import Grid, Variant, last_scores, of_task
from .records import Record, Run
from .scale import Scale

Draw = Callable[[Any, Scale, Sequence[Run]], None]
WINDOW = 20  # the running mean of a loss curve is over this part of the steps


def numbers_against_score(grid: Grid) -> Draw:
    """A point for each variant on the first task, its mean over the seeds."""

    def draw(axes: Any, scale: Scale, runs: Sequence[Run]) -> None:
        task = scale.of_tasks(grid.tasks)[0]
        for index, (variant, own) in enumerate(_on_task(grid, scale, runs, task)):
            numbers = max(own[0].record["trained"], 1)
            marker = "osv^DPX*"[index // 10 % 8]
            axes.plot(numbers, mean(last_scores(own)), marker, label=variant.label)
        axes.set(xscale="log", xlabel="numbers trained beside the head", ylabel=f"score, {task}")
        _legend(axes)

    return draw


def by_size(grid: Grid) -> Draw:
    """A line for each method over the size of its training set."""

    def draw(axes: Any, scale: Scale, runs: Sequence[Run]) -> None:
        task = scale.of_tasks(grid.tasks)[0]
        lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for variant, own in _on_task(grid, scale, runs, task):
            point = own[0].cell.train_rows, mean(last_scores(own))
            lines[variant.label.rpartition(",")[0]].append(point)
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axes.set(xscale="log", xlabel="sentences to train", ylabel=f"score, {task}")
        _legend(axes)

    return draw


def score_by_epoch(grid: Grid) -> Draw:
    def draw(axes: Any, scale: Scale, runs: Sequence[Run]) -> None:
        task = scale.of_tasks(grid.tasks)[0]
        for variant, own in _on_task(grid, scale, runs, task):
            scores = _mean_curve([run.record["scores"] for run in own])
            axes.plot(range(1, 1 + len(scores)), scores, marker="o", label=variant.label)
        axes.set(xlabel="epoch", ylabel=f"score, {task}")
        _legend(axes)

    return draw


def loss_curves(grid: Grid) -> Draw:
    def draw(axes: Any, scale: Scale, runs: Sequence[Run]) -> None:
        task = scale.of_tasks(grid.tasks)[0]
        for variant, own in _on_task(grid, scale, runs, task):
            losses = _mean_curve([run.record["losses"] for run in own])
            window = max(1, len(losses) // WINDOW)
            smooth = [mean(losses[max(0, i - window) : i + 1]) for i in range(len(losses))]
            axes.plot(smooth, label=variant.label)
        axes.set(xlabel="step", ylabel="training loss (running mean)")
        _legend(axes)

    return draw


def by_layer(grid: Grid, measure: str) -> Draw:
    """A line for each variant over its layers, the mean of the seeds."""

    def draw(axes: Any, scale: Scale, runs: Sequence[Run]) -> None:
        task = scale.of_tasks(grid.tasks)[0]
        for variant, own in _on_task(grid, scale, runs, task):
            values = [list(run.record["measured"][measure].values()) for run in own]
            axes.plot(_mean_curve(values), marker="o", label=variant.label)
        axes.set(
            yscale="log", xlabel="layer, in the model's order", ylabel=measure.replace("_", " ")
        )
        _legend(axes)

    return draw


def lines_of(
    x: str, y: str, name: str, **axis: Any
) -> Callable[[Any, Scale, Sequence[Record]], None]:
    """A line for each ``name`` of measured rows."""

    def draw(axes: Any, scale: Scale, rows: Sequence[Record]) -> None:
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            lines[row[name]].append((row[x], row[y]))
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set(**{"xlabel": x, "ylabel": y, **axis})
        _legend(axes)

    return draw


def _on_task(
    grid: Grid, scale: Scale, runs: Sequence[Run], task: str
) -> Iterator[tuple[Variant, list[Run]]]:
    """Variants that ended with a score on ``task``, and those of their runs that did."""
    for variant, own in grid.by_variant(scale, runs):
        ended = [run for run in of_task(own, task) if run.score is not None]
        if ended:
            yield variant, ended


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    return [mean(values) for values in zip(*curves, strict=True)]


def _legend(axes: Any) -> None:
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
