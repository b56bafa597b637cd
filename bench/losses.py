"""Where another variant with the same numbers is ahead, and where bench/notes/bench.md says why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .compare import noise
from .machine import REPOSITORY
from .rows import OK, Row
from .table import by_case, title

OURS = "qrlora_kernels"
NAMES = {"qr": "QR-LoRA", "lora_xs": "LoRA-XS", "ohora": "OHoRA", "lokr": "LoKr"}
NOTES = REPOSITORY / "bench" / "notes" / "bench.md"
# What a suite is judged by.
DECIDES = {
    "layer": "both",
    "grid": "both",
    "cpu": "both",
    "decode": "forward",
    "start": "start",
    "pivots": "start",
    "model": "step",
}
_HEADING = "## Where an alternative is ahead"


@dataclass(frozen=True)
class Loss:
    """One case in which ``best`` beats this package by ``gap`` of our time, beyond noise."""

    ours: Row
    best: Row
    gap: float

    @property
    def key(self) -> str:
        """Under which the notes explain it."""
        return f"{self.ours.suite} {self.ours.adapter}"

    def __str__(self) -> str:
        ours = self.ours
        rank = f", r = {ours.r}" if ours.r else ""
        return (
            f"{title(ours)}{rank} ({ours.metric}, {ours.clock}): {self.best.variant} "
            f"by {self.gap:.0%}"
        )


def contests(rows: list[Row]) -> Iterator[tuple[Row, Row]]:
    """(ours, the best rival) of every case with a rival of the same family, rank and clock.

    A variant that ran the same backend as ours did is the same code, and no rival; nor is one that
    keeps frozen matrices packed, unless ours does.
    """
    for group in by_case(rows):
        deciding = [
            r
            for r in group
            if r.metric == DECIDES.get(r.suite)
            and r.value
            and r.status == OK
            and r.adapter
            and r.clock in ("wall", "device")
        ]
        for ours in (r for r in deciding if r.variant.partition(" ")[0] == OURS):
            rivals = [
                r
                for r in deciding
                if (r.adapter, r.r, r.clock) == (ours.adapter, ours.r, ours.clock)
                and not r.variant.startswith(OURS)
                and not (r.backend and r.backend == ours.backend)
                and (_keeps_layouts(ours) or not _keeps_layouts(r))
            ]
            if rivals:
                yield ours, min(rivals, key=lambda r: r.value or 0.0)


def _keeps_layouts(row: Row) -> bool:
    """Whether frozen matrices are kept in another layout too, which takes their memory again."""
    return row.variant.endswith("packed")


def losses(rows: list[Row]) -> list[Loss]:
    """Every contest that this package loses beyond noise."""
    found = []
    for ours, best in contests(rows):
        mine, theirs = ours.value or 0.0, best.value or 0.0
        if theirs * (1 + noise(best) + noise(ours)) < mine:
            found.append(Loss(ours, best, 1 - theirs / mine))
    return found


def reasons(notes: str | None = None) -> dict[str, str]:
    """The notes' explanations by "suite adapter": its heading, and the text below it."""
    text = NOTES.read_text() if notes is None else notes
    _, _, section = text.partition(f"\n{_HEADING}\n")
    parts = re.split(r"^(#+) (.*)$", section, flags=re.MULTILINE)
    found: dict[str, str] = {}
    for level, heading, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if len(level) < 3:
            break
        found[heading.strip()] = body.strip()
    return found


def unexplained(rows: list[Row], notes: str | None = None) -> list[str]:
    """Keys of losses of which the notes do not say why."""
    known = reasons(notes)
    return [key for key in dict.fromkeys(loss.key for loss in losses(rows)) if not known.get(key)]


def listed(rows: list[Row]) -> list[str]:
    """The losses as lines of markdown, by suite and family, each with a link to its reason."""
    groups: dict[str, list[Loss]] = {}
    for loss in losses(rows):
        groups.setdefault(loss.key, []).append(loss)
    lines = []
    for key, group in groups.items():
        suite, _, adapter = key.partition(" ")
        link = f"../bench/notes/bench.md#{key.replace(' ', '-')}"
        lines.append(f"- **{suite}, {NAMES.get(adapter, adapter)}** ([why]({link})):")
        lines += [f"  - {loss}" for loss in group]
    return lines
