"""The picture of a comparison: loss curves, and QR-LoRA's spectra with the λ of one seed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .report import Result, by_method

COLUMNS = 4


def draw(results: Sequence[Result], path: Path) -> bool:
    """Write the picture to ``path``; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    layers = next((r["layers"] for r in results if r["layers"]), {})
    rows = -(-len(layers) // COLUMNS)
    figure = Figure(figsize=(12, 4 + 2.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + rows, COLUMNS, height_ratios=[1.8, *[1.0] * rows])
    _draw_losses(figure.add_subplot(grid[0, : COLUMNS // 2]), results)
    _draw_scores(figure.add_subplot(grid[0, COLUMNS // 2 :]), results)
    for index, (name, layer) in enumerate(layers.items()):
        axes = figure.add_subplot(grid[1 + index // COLUMNS, index % COLUMNS])
        _draw_layer(axes, name, layer, index)
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, path)
    return True


def _draw_losses(axes: Any, results: Sequence[Result]) -> None:
    for name, runs in by_method(results).items():
        losses = np.mean([run["losses"] for run in runs], axis=0)
        window = max(1, len(losses) // 20)
        axes.plot(_running_mean(losses, window), label=name)
    axes.set(xlabel="step", ylabel="training loss (running mean)", title="Loss, mean of the seeds")
    axes.legend()


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of the last ``window`` values, of fewer at the beginning."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return (total[stop] - total[start]) / (stop - start)


def _draw_scores(axes: Any, results: Sequence[Result]) -> None:
    """The mean of the seeds by epoch; the bars reach from the lowest to the highest."""
    metric = next(iter(results[0]["scores"][0]))
    epochs = range(1, 1 + len(results[0]["scores"]))
    for name, runs in by_method(results).items():
        values = np.array([[scores[metric] for scores in run["scores"]] for run in runs])
        mean = values.mean(axis=0)
        reach = [mean - values.min(axis=0), values.max(axis=0) - mean]
        axes.errorbar(epochs, mean, yerr=reach, marker="o", capsize=3, label=name)
    axes.set(xlabel="epoch", ylabel=metric, title="Evaluation", xticks=list(epochs))


def _draw_layer(axes: Any, name: str, layer: dict[str, Any], index: int) -> None:
    spectrum, rank = layer["spectrum"], layer["rank"]
    axes.semilogy(range(1, len(spectrum) + 1), spectrum, color="0.3", linewidth=1)
    axes.axvspan(0.5, rank + 0.5, color="tab:blue", alpha=0.15)
    axes.set_title(f"{_short(name)}: kept {rank} of {len(spectrum)}", fontsize=8)
    axes.tick_params(labelsize=7)
    learned = axes.twinx()
    learned.vlines(range(1, rank + 1), 0.0, layer["lam"], color="tab:red", linewidth=0.7)
    learned.tick_params(labelsize=7, colors="tab:red")
    if index % COLUMNS == 0:
        axes.set_ylabel("|R_ii|", fontsize=8)
    if index % COLUMNS == COLUMNS - 1:
        learned.set_ylabel("learned λ", fontsize=8, color="tab:red")


def _short(name: str) -> str:
    """The layer's number and own name: "encoder.layer.0.attention.self.query" gives "0 query"."""
    parts = name.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return " ".join([*numbers[:1], parts[-1]])
