"""Three pictures from the recorded rows: layer against tokens, start against size, memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from .losses import NAMES, OURS
from .machine import REPOSITORY, slug
from .rows import RED, SKIPPED, Row
from .summary import Line, lines_for

FOLDER = "images"
_KINDS = ("layer", "start", "memory")


def names(rows: list[Row]) -> list[str]:
    """The files that :func:`draw` makes, relative to docs/."""
    chips = dict.fromkeys(slug(row.chip) for row in rows)
    return [
        f"{FOLDER}/{chip}-{kind}.svg"
        for chip in chips
        for kind in _KINDS
        if any(slug(row.chip) == chip and row.suite == kind for row in rows)
    ]


def draw(rows: list[Row]) -> list[str]:
    """Draw every picture; returns their names. Without matplotlib the files stay as they are."""
    wanted = names(rows)
    if not wanted or importlib.util.find_spec("matplotlib") is None:
        return wanted
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Text as text and fixed ids: the same rows give the same file.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 9})
    drawers: dict[str, Callable[[Any, list[Row]], None]] = {
        "layer": _layer,
        "start": _start,
        "memory": _memory,
    }
    for name in wanted:
        chip, _, kind = name.removeprefix(f"{FOLDER}/").removesuffix(".svg").rpartition("-")
        figure = plt.figure(figsize=(8, 3.6), layout="constrained")
        drawers[kind](figure, [r for r in rows if slug(r.chip) == chip and r.suite == kind])
        path = REPOSITORY / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return wanted


def _usable(rows: list[Row], metric: str) -> list[Row]:
    return [r for r in rows if r.metric == metric and r.value and r.status not in (RED, SKIPPED)]


def _layer(figure: Any, rows: list[Row]) -> None:
    """A panel per family: this package, the best plain code, and what PEFT and LyCORIS need."""
    rows = [r for r in _usable(rows, "both") if r.clock != "wall" or r.device == "cpu"]
    shapes = [(r.n, r.k, r.dtype) for r in rows if not r.adapter]
    shape = max(shapes, key=shapes.count)
    rows = [r for r in rows if (r.n, r.k, r.dtype) == shape and r.ratio]
    panels = figure.subplots(1, len(NAMES), sharey=True)
    for axes, name in zip(panels, NAMES.values(), strict=True):
        wanted = "LoRA (other maths)" if name != "LoKr" else "LoKr, best of"
        for line in lines_for():
            if not line.name.strip("*").startswith((f"{name},", wanted)):
                continue
            best = _best_by(rows, line, lambda r: r.m, lambda r: r.ratio or 0.0)
            if best:
                label = line.name.strip("*").removeprefix(f"{name}, ")
                axes.plot(*zip(*best, strict=True), label=label, **_style(label))
        axes.axhline(1.0, color="black", lw=1, label="frozen layer")
        axes.set(xscale="log", yscale="log", xlabel="tokens M", title=name)
        axes.set_yticks([1, 1.5, 2, 3, 5, 10, 20], labels=["1", "1.5", "2", "3", "5", "10", "20"])
        axes.minorticks_off()
    panels[0].set_ylabel("time over the frozen layer")
    drawn: dict[str, Any] = {}
    for axes in panels:
        drawn.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(drawn.values(), drawn.keys(), fontsize=7, ncols=4, loc="outside lower center")
    figure.suptitle(f"forward and backward, {shape[0]}×{shape[1]}, {shape[2]}")


def _style(label: str) -> dict[str, Any]:
    if label == "this package":
        return {"color": "C0", "marker": "o", "lw": 2}
    colors = ("best of eager", "LoRA (other maths), best", "best of PEFT", "best of LyCORIS")
    found = [f"C{i + 1}" for i, start in enumerate(colors) if label.startswith(start)]
    return {"color": found[0] if found else "0.4", "ls": "--", "lw": 1.4}


def _start(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    rows = _usable(rows, "start")
    rank, dtype = max(r.r for r in rows), rows[0].dtype
    rows = [r for r in rows if (r.r, r.dtype) == (rank, dtype)]
    for name in dict.fromkeys(r.variant for r in rows):
        line = Line(name, lambda r, name=name: r.variant == name)  # type: ignore[misc]
        points = _best_by(rows, line, lambda r: (r.n * r.k) ** 0.5, lambda r: r.value or 0.0)
        floor = name == "one product"
        style: dict[str, Any] = {"marker": "o", "lw": 2 if name.startswith(OURS) else 1}
        if floor:
            style = {"color": "black", "lw": 1}
        elif not name.startswith(OURS):
            style["ls"] = "--"
        axes.plot(*zip(*points, strict=True), label="floor: " + name if floor else name, **style)
    axes.set(xscale="log", yscale="log", xlabel="√(N·K)", ylabel="ms")
    axes.set_title(f"time to start, one matrix, r = {rank}, {dtype}")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _memory(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    rows = [r for r in _usable(rows, "saved") if r.case() == rows[0].case()]
    rows.sort(key=lambda r: r.value or 0.0)
    labels = [f"{r.adapter} {r.variant} r={r.r}" for r in rows]
    colors = ["C0" if r.variant.startswith(OURS) else "0.7" for r in rows]
    figure.set_figheight(1 + 0.17 * len(rows))
    axes.barh(labels, [(r.value or 0.0) / 2**20 for r in rows], color=colors)
    axes.set(xscale="log", xlabel="MiB kept for backward")
    axes.tick_params(axis="y", labelsize=6)
    axes.set_title(f"M = {rows[0].m}, {rows[0].n}×{rows[0].k}, {rows[0].dtype}")


def _best_by(
    rows: list[Row], line: Line, x: Callable[[Row], float], y: Callable[[Row], float]
) -> list[tuple[float, float]]:
    """The lowest point at each x of the rows that ``line`` takes."""
    best: dict[float, float] = {}
    for row in filter(line.takes, rows):
        best[x(row)] = min(y(row), best.get(x(row), float("inf")))
    return sorted(best.items())
