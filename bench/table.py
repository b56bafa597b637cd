"""Rows as text: one block per case, one line per variant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .rows import OK, RED, SKIPPED, Row

METRICS = (
    *("forward", "backward", "both", "no_grad", "grad"),
    *("step", "tokens", "start", "saved", "peak", "disk"),
)
CLOCKS = ("wall", "device", "graph", "thread", "")


def text(rows: Sequence[Row]) -> str:
    """Everything that was measured, for a terminal."""
    return "\n\n".join(map(_block, by_case(rows)))


def title(row: Row) -> str:
    """The case in words."""
    shape = row.model or (f"M={row.m} " if row.m else "") + f"{row.n}x{row.k} {row.dtype}"
    return f"{row.suite}: {shape} on {row.device}" + (", cold cache" if row.cache == "cold" else "")


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is the head."""
    head, *body = lines
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def cells(rows: list[Row]) -> list[list[str]]:
    """One case as a table: a head, then a line per variant."""
    columns = [(m, c) for m in METRICS for c in CLOCKS if _has(rows, m, c)]
    heads = [f"{m} ({c})" if c in ("device", "graph") else m for m, c in columns]
    lines = [["adapter", "variant", "r", *heads, "gate", "remark"]]
    for (adapter, variant, _), group in _variants(rows):
        found = {(row.metric, row.clock): row for row in group}
        first = group[0]
        values = [number(found.get(column)) for column in columns]
        rank = str(first.r) if first.r and first.status != SKIPPED else ""
        lines.append([adapter, variant, rank, *values, gate(first), _remark(group)])
    return lines


def _block(rows: list[Row]) -> str:
    lines = cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    body = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([title(rows[0]), *(line.rstrip() for line in body)])


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that are compared with one another, in the order in which they were measured."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row.chip, *row.case()), []).append(row)
    return list(found.values())


def _has(rows: Iterable[Row], metric: str, clock: str) -> bool:
    return any(row.metric == metric and row.clock == clock for row in rows)


def _variants(rows: list[Row]) -> list[tuple[tuple[str, str, int], list[Row]]]:
    """Rows by variant and rank, the families together, the floor first."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.adapter, row.variant, row.r), []).append(row)
    families = list(dict.fromkeys(adapter for adapter, _, _ in found))
    return sorted(found.items(), key=lambda item: families.index(item[0][0]))


def number(row: Row | None) -> str:
    """Value, its 20 to 80 % range, and the ratio to the floor."""
    if row is None or row.value is None:
        return "-"
    value = quantity(row.value, row.unit)
    if row.q20 is not None and row.q80 is not None and row.unit in ("ms", "µs"):
        value += f" ({row.q20:.3g} to {row.q80:.3g})"
    return value if row.ratio is None or row.value == 0 else f"{value} {row.ratio:.2f}x"


def quantity(value: float, unit: str) -> str:
    """A number with its unit, readable at a glance."""
    if unit == "B":
        for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if value >= size:
                return f"{value / size:.3g} {name}"
    if unit == "ms" and value >= 1000:
        return f"{value / 1000:.3g} s"
    if unit == "tokens/s":
        return f"{value:,.0f} {unit}"
    return f"{value:.3g} {unit}".rstrip()


def gate(row: Row) -> str:
    """The verdict in a word."""
    if row.status == OK:
        return "green" if row.gate is not None else "floor"
    return row.status


def _remark(rows: list[Row]) -> str:
    notes = [row.backend for row in rows[:1] if row.backend]
    if rows[0].status in (RED, SKIPPED):
        notes += list(dict.fromkeys(row.note for row in rows if row.note))
    return "; ".join(notes)
