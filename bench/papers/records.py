"""The results: a file of JSON lines, one a run or a measurement, that is only ever added to."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import qrlora_kernels as qk

from .cell import Cell

Record = dict[str, Any]


def versions() -> dict[str, str]:
    """Those that decide the numbers of a run."""
    return {
        "qrlora_kernels": qk.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Run:
    """A cell and its record; ``record`` is empty where it has not been run."""

    cell: Cell
    record: Record

    @property
    def score(self) -> float | None:
        """Of the last epoch; None where the loss was no number before."""
        scores = self.record["scores"]
        return float(scores[-1]) if scores else None


@dataclass
class Records:
    """What has been run so far, by digest; a later line replaces an earlier one."""

    path: Path
    lines: list[Record] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Records:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return cls(path, [json.loads(line) for line in text.splitlines()])

    def add(self, record: Record) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.lines.append(record)

    def find(self, digest: str, **same: Any) -> Record:
        """The last record of ``digest`` that agrees with ``same``; empty if there is none."""
        for record in reversed(self.lines):
            if record["digest"] == digest and all(record[k] == v for k, v in same.items()):
                return record
        return {}

    def runs(self, cells: Iterable[Cell]) -> list[Run]:
        """Those of ``cells`` that have a record, whatever versions it was made with."""
        found = (Run(cell, self.find(cell.digest())) for cell in cells)
        return [run for run in found if run.record]
