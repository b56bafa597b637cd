"""A regression guard: what moved beyond noise between two recorded runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from .rows import OK, RED, Row, read, read_folder

# Nothing closer than this is called a change, however quiet both runs were.
LEAST_NOISE = 0.05
_MORE_IS_BETTER = {"tokens/s"}


@dataclass(frozen=True)
class Change:
    """One measurement in both runs; ``factor`` is new over old cost, above 1 worse."""

    row: Row
    factor: float
    noise: float

    @property
    def worse(self) -> bool:
        return self.factor > 1 + self.noise

    def __str__(self) -> str:
        word = "slower" if self.row.unit in ("ms", "s", "tokens/s") else "larger"
        if not self.worse:
            word = "faster" if word == "slower" else "smaller"
        return f"{_name(self.row)}: {self.factor:.2f}x, {word} (noise {self.noise:.0%})"


def load(path: Path) -> list[Row]:
    """Rows of a file, or of all CSV files of a folder."""
    return read_folder(path) if path.is_dir() else read(path)


def compare(old: list[Row], new: list[Row]) -> tuple[list[Change], list[str]]:
    """(changes beyond noise, worst first; failures: gates turned red, measurements gone).

    Where both runs measured a floor, ratios to it are compared: they carry over between days and
    loads of one machine, which milliseconds do not.
    """
    before, after = ({row.key(): row for row in rows if row.metric} for rows in (old, new))
    changes, failures = [], []
    for key, was in before.items():
        if was.value is None:
            continue
        now = after.get(key)
        if now is None or now.value is None:
            failures.append(f"{_name(was)}: not measured any more")
        elif now.status == RED and was.status != RED:
            failures.append(f"{_name(was)}: the gate turned red ({now.note})")
        elif was.status != RED and (change := _change(was, now)):
            changes.append(change)
    return sorted(changes, key=lambda c: -c.factor), failures


def _change(was: Row, now: Row) -> Change | None:
    old, new = was.value, now.value
    if was.ratio and now.ratio and was.ratio != 1.0:
        old, new = was.ratio, now.ratio
    if not old or not new:
        return None
    factor = old / new if was.unit in _MORE_IS_BETTER else new / old
    change = Change(now, factor, noise(was) + noise(now) if was.q20 else 0.0)
    return None if 1 / (1 + change.noise) <= factor <= 1 + change.noise else change


def noise(row: Row) -> float:
    """Relative half-width of the quantiles or distance of the two runs, whichever is larger."""
    if not row.value or row.q20 is None or row.q80 is None:
        return LEAST_NOISE
    spread = (row.q80 - row.q20) / (2 * row.value)
    apart = abs(math.log(row.first / row.second)) if row.first and row.second else 0.0
    return max(LEAST_NOISE, spread, apart)


def report(old: Path, new: Path) -> tuple[str, int]:
    """The text to print, and the exit status: 1 if anything got worse."""
    before, after = load(old), load(new)
    changes, failures = compare(before, after)
    lines = []
    for name in ("cpu", "gpu", "threads", "versions"):
        was, now = ({getattr(row, name) for row in rows} for rows in (before, after))
        if was != now:
            lines.append(f"note: {name} differs: {sorted(was)} and {sorted(now)}")
    lines += [*failures, *map(str, changes)]
    worse = [change for change in changes if change.worse]
    gated = sum(row.status == OK for row in after)
    lines.append(
        f"{len(worse)} worse, {len(changes) - len(worse)} better, {len(failures)} lost or red, "
        f"{gated} of {len(after)} rows gated green or floor"
    )
    return "\n".join(lines), 1 if worse or failures else 0


def _name(row: Row) -> str:
    where = row.model or f"M={row.m} {row.n}x{row.k} {row.dtype}"
    clock = f" ({row.clock})" if row.clock not in ("wall", "") else ""
    who = f"{row.adapter} {row.variant}".strip()
    return f"{row.suite} {where} {who} r={row.r} {row.metric}{clock}"
