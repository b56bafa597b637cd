"""One measured number is one row; rows live as CSV with a JSON twin."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TextIO

from .machine import facts

OK, OTHER, RED, SKIPPED = "ok", "other maths", "RED", "skipped"


@dataclass(frozen=True)
class Row:
    """One number with everything needed to believe or repeat it.

    ``status`` is "ok" (the gate is green), "other maths" (nothing to gate against), "RED" (wrong
    result: no ratio is given) or "skipped" (``note`` says why). ``value`` is the median over two
    runs in ``unit``, with its 20 % and 80 % quantiles; ``first`` and ``second`` are the medians of
    each run. ``ratio`` is ``value`` over that of the suite's floor, measured interleaved with it.
    ``gate`` is the largest error relative to what the same gate allows.
    """

    suite: str
    variant: str
    metric: str
    adapter: str = ""
    model: str = ""
    m: int = 0
    n: int = 0
    k: int = 0
    r: int = 0
    dtype: str = ""
    device: str = ""
    clock: str = "wall"
    cache: str = "warm"
    status: str = OK
    value: float | None = None
    q20: float | None = None
    q80: float | None = None
    first: float | None = None
    second: float | None = None
    unit: str = "ms"
    ratio: float | None = None
    gate: float | None = None
    backend: str = ""
    note: str = ""
    machine: str = field(default_factory=lambda: facts()["machine"])
    cpu: str = field(default_factory=lambda: facts()["cpu"])
    gpu: str = field(default_factory=lambda: facts()["gpu"])
    threads: str = field(default_factory=lambda: facts()["threads"])
    versions: str = field(default_factory=lambda: facts()["versions"])
    commit: str = field(default_factory=lambda: facts()["commit"])

    @property
    def chip(self) -> str:
        """What ran: the GPU, or the CPU and its threads."""
        return self.gpu if self.device == "cuda" else f"{self.cpu}, {self.threads} threads"

    def key(self) -> tuple[Any, ...]:
        """What identifies the measurement, whatever it gave."""
        return tuple(getattr(self, name) for name in KEY)

    def case(self) -> tuple[Any, ...]:
        """What rows that are compared with one another share."""
        return tuple(getattr(self, name) for name in CASE)


CASE = ("suite", "model", "m", "n", "k", "dtype", "device", "cache")
KEY = (*CASE, "adapter", "variant", "r", "metric", "clock")
_NUMBERS: dict[str, Callable[[str], float | int]] = {
    **dict.fromkeys(("m", "n", "k", "r"), int),
    **dict.fromkeys(("value", "q20", "q80", "first", "second", "ratio", "gate"), float),
}


def with_ratios(rows: Sequence[Row], floor: str) -> list[Row]:
    """Give each row the ratio to the ``floor`` variant of its case, unless its gate is red."""
    floors = {
        (row.case(), row.metric, row.clock): row.value for row in rows if row.variant == floor
    }
    return [replace(row, ratio=_ratio(row, floors)) for row in rows]


def _ratio(row: Row, floors: dict[tuple[Any, ...], float | None]) -> float | None:
    base = floors.get((row.case(), row.metric, row.clock))
    if row.status in (RED, SKIPPED) or row.value is None or not base:
        return None
    return row.value / base


def write(rows: Sequence[Row], path: Path, twin: bool = True) -> None:
    """``path`` as CSV and its JSON twin beside it, each by a temporary name and a rename."""
    table = [asdict(row) for row in rows]

    def as_csv(out: TextIO) -> None:
        writer = csv.DictWriter(out, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows([{key: _cell(value) for key, value in row.items()} for row in table])

    replace_file(path.with_suffix(".csv"), as_csv)
    if twin:
        replace_file(path.with_suffix(".json"), lambda out: json.dump(table, out, indent=1))


def read(path: Path) -> list[Row]:
    """Rows of a CSV or JSON file that :func:`write` made.

    Raises
    ------
    ValueError
        If the file has other columns.
    """
    known = {f.name for f in fields(Row)}
    with path.open(newline="") as source:
        table = json.load(source) if path.suffix == ".json" else list(csv.DictReader(source))
    for row in table:
        if set(row) != known:
            odd = sorted(known ^ set(row))
            raise ValueError(f"{path} must hold rows of this benchmark, got other columns: {odd}")
    return [Row(**{key: _value(key, cell) for key, cell in row.items()}) for row in table]


def read_folder(folder: Path) -> list[Row]:
    """All rows of the CSV files in ``folder``, in the order of their names."""
    return [row for path in sorted(folder.glob("*.csv")) for row in read(path)]


def replace_file(path: Path, fill: Callable[[TextIO], object]) -> None:
    """Write ``path`` so that a reader meets the old text or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", newline="") as out:
            fill(out)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _value(key: str, cell: Any) -> Any:
    if key not in _NUMBERS or not isinstance(cell, str):
        return cell
    return _NUMBERS[key](cell) if cell else None
