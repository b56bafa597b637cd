"""A table of a paper: what has to be run for it, and how its lines follow from the results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from .cell import Cell
from .records import Record, Records, Run, versions
from .runner import Workshop, where
from .scale import Scale

NOT_AT_HAND = "not at hand"
Line = dict[str, str]  # by column
Result = TypeVar("Result", Run, Record)
Lines = Callable[[Scale, Sequence[Result]], list[Line]]
Draw = Callable[[Any, Scale, Sequence[Result]], None]  # onto matplotlib's axes
Remark = Callable[[Scale, Sequence[Result]], str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """What the page says of a table beside its lines."""

    name: str
    paper: str  # and where in it
    title: str
    about: str
    not_shown: str  # of the paper's, and why

    def missing(self, workshop: Workshop, scale: Scale) -> tuple[int, int]:
        """How many runs are to be done, of how many."""
        raise NotImplementedError

    def run(self, workshop: Workshop, scale: Scale, jobs: int) -> int:
        """Run what is missing; how many runs failed."""
        raise NotImplementedError

    def results(self, scale: Scale, records: Records) -> Sequence[Any]:
        """Those that there are so far."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TrainedTable(Table):
    """A table of training runs, in an order of which every prefix is a fair comparison."""

    cells: Callable[[Scale], Sequence[Cell]]
    lines: Lines[Run]
    draw: Draw[Run] | None = None
    remark: Remark[Run] | None = None

    def missing(self, workshop: Workshop, scale: Scale) -> tuple[int, int]:
        cells = self.cells(scale)
        return len(workshop.missing(cells)), len(cells)

    def run(self, workshop: Workshop, scale: Scale, jobs: int) -> int:
        return workshop.run(self.cells(scale), jobs)

    def results(self, scale: Scale, records: Records) -> Sequence[Run]:
        return records.runs(self.cells(scale))


@dataclass(frozen=True, kw_only=True)
class MeasuredTable(Table):
    """A table that no training is needed for: ``measure`` gives its rows at once."""

    measure: Callable[[Scale, Workshop], list[Record]]
    lines: Lines[Record]
    draw: Draw[Record] | None = None
    remark: Remark[Record] | None = None
    timed: bool = False  # its rows belong to the processor that they were measured on

    def digest(self, scale: Scale) -> str:
        claims = {"table": self.name, "scale": asdict(scale)}
        return hashlib.sha256(json.dumps(claims, sort_keys=True).encode()).hexdigest()[:16]

    def missing(self, workshop: Workshop, scale: Scale) -> tuple[int, int]:
        here = where()
        same = {"versions": versions()} | ({"cpu": here["cpu"]} if self.timed else {})
        return int(not workshop.records.find(self.digest(scale), **same)), 1

    def run(self, workshop: Workshop, scale: Scale, jobs: int) -> int:
        if self.missing(workshop, scale)[0]:
            record: Record = {
                "digest": self.digest(scale),
                "table": self.name,
                "scale": asdict(scale),
                "versions": versions(),
                **where(),
            }
            workshop.records.add(record | {"rows": self.measure(scale, workshop)})
        return 0

    def results(self, scale: Scale, records: Records) -> Sequence[Record]:
        rows: Sequence[Record] = records.find(self.digest(scale)).get("rows", [])
        return rows
