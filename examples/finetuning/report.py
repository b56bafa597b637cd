"""The results of several runs as one table over the seeds, and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .methods import METHODS

Result = dict[str, Any]


def write_result(path: Path, result: Result) -> None:
    """Write JSON under a temporary name, then rename: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_result(path: Path) -> Result:
    result: Result = json.loads(path.read_text(encoding="utf-8"))
    return result


def append_line(path: Path, result: Result) -> None:
    """Add the result to a file of JSON lines, one a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def name_of(result: Result) -> str:
    return METHODS[result["settings"]["adapter"]].label


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each row, in the order of the first; runs of a row differ in their seed."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(name_of(result), []).append(result)
    return rows


def table(results: Sequence[Result]) -> str:
    """A Markdown table, one row a method, with what its columns mean below."""
    metrics = list(results[0]["scores"][-1])
    header = ["method", *metrics, "trained", "seconds", "peak memory", "file"]
    rows = [_row(name, runs, metrics) for name, runs in by_method(results).items()]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [_line(cells, widths) for cells in (header, rule, *rows)]
    return "\n".join([*lines, "", *_notes(results)])


def _row(name: str, runs: Sequence[Result], metrics: Sequence[str]) -> list[str]:
    memory = [run["peak_memory"] for run in runs if run["peak_memory"] is not None]
    return [
        name,
        *(with_spread(run["scores"][-1][metric] for run in runs) for metric in metrics),
        f"{runs[0]['trained']:,}",
        f"{mean(seconds(run) for run in runs):.1f}",
        _size(max(memory)) if memory else "-",
        _size(runs[0]["adapter_bytes"]),
    ]


def with_spread(scores: Iterable[float]) -> str:
    """The mean, and the standard deviation where there are several."""
    values = list(scores)
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def seconds(result: Result) -> float:
    """What starting the adapter and training it took."""
    return float(result["seconds_to_start"] + sum(result["seconds_an_epoch"]))


def _line(cells: list[str], widths: list[int]) -> str:
    first, *rest = (
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "| " + " | ".join([first, *rest]) + " |"


def _notes(results: Sequence[Result]) -> list[str]:
    first = results[0]
    settings, versions = first["settings"], first["versions"]
    train, held = first["rows"]
    seeds = sorted({result["settings"]["seed"] for result in results})
    before = [r["memory_before"] for r in results if r["memory_before"] is not None]
    loaded = f" ({_size(min(before))} of it libraries and base model)" if before else ""
    spread = "; ± is the standard deviation over them" if len(seeds) > 1 else ""
    epochs = settings["epochs"]
    return [
        f"Score of {held:,} rows after {epochs} epoch{'s' * (epochs > 1)} of {train:,} rows"
        f"{' of ' + settings['task'] if settings['task'] else ''}, "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}{spread}.",
        f"Trained: numbers besides the head's {first['head']:,}, which all rows train and all "
        "files hold.",
        "Seconds: to start the adapter and to train, without evaluation. Peak memory: of "
        f"{_owner(settings)} until training ends{loaded}.",
        f"{settings['precision']}; {versions['machine']}; "
        f"torch {versions['torch']}, qrlora_kernels {versions['qrlora_kernels']}.",
    ]


def _owner(settings: dict[str, Any]) -> str:
    return "the whole process" if settings["device"] == "cpu" else "PyTorch on the device"


def _size(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size >= 10 * 2**20 else f"{size / 1024:.1f} KiB"
