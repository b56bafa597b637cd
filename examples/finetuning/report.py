"""The results of several runs as one table, and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from .settings import NAMES

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


def name_of(result: Result) -> str:
    return NAMES[result["settings"]["adapter"]]


def table(results: Sequence[Result]) -> str:
    """A Markdown table, one row a run, with what its columns mean below."""
    metrics = list(results[0]["scores"][-1])
    header = ["adapter", "trained", *metrics, "s/epoch", "s to start", "file", "peak memory"]
    rows = [_row(result, metrics) for result in results]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [_line(cells, widths) for cells in (header, rule, *rows)]
    return "\n".join([*lines, "", *_notes(results)])


def _row(result: Result, metrics: list[str]) -> list[str]:
    return [
        name_of(result),
        f"{result['trained']:,}",
        *(f"{result['scores'][-1][metric]:.3f}" for metric in metrics),
        f"{mean(result['seconds_an_epoch']):.1f}",
        f"{result['seconds_to_start']:.2f}",
        f"{result['adapter_bytes'] / 1024:.1f} KiB",
        _mebibytes(result["peak_memory"]),
    ]


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
    before = [r["memory_before"] for r in results if r["memory_before"] is not None]
    loaded = f" ({_mebibytes(min(before))} of it libraries and base model)" if before else ""
    return [
        f"Trained: numbers besides the head's {first['head']:,}, which all runs train and all "
        "files hold.",
        f"Peak memory: of {_owner(settings)} until training ends{loaded}.",
        f"{train:,} training rows, epochs: {settings['epochs']}, {held:,} evaluation rows, seed "
        f"{settings['seed']}, {settings['precision']}; {versions['machine']}; "
        f"torch {versions['torch']}, qrlora_kernels {versions['qrlora_kernels']}.",
    ]


def _owner(settings: dict[str, Any]) -> str:
    return "the whole process" if settings["device"] == "cpu" else "PyTorch on the device"


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f} MiB"
