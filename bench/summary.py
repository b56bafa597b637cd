"""The short tables: what a reader of the README wants to know, chosen from the recorded rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .losses import NAMES, OURS
from .rows import OTHER, RED, SKIPPED, Row
from .table import by_case, markdown, quantity

_PLAIN = ("eager", "torch.compile", "addmm")


@dataclass(frozen=True)
class Line:
    """A line of a short table: its name, and which rows it may take the best of."""

    name: str
    takes: Callable[[Row], bool]


def lines_for(families: Iterable[str] = NAMES) -> list[Line]:
    """This package and its alternatives, family by family."""
    found = []
    for family in families:
        found.append(_line(f"**{NAMES[family]}, this package**", family, (OURS,)))
        found.append(_line(f"{NAMES[family]}, best of {', '.join(_PLAIN)}", family, _PLAIN))
    found.append(_line("LoKr, best of LyCORIS", "lokr", ("lycoris",)))
    found.append(_line("LoKr, best of PEFT", "lokr", ("peft",)))
    found.append(
        Line(
            "LoRA (other maths), PEFT default", lambda r: (r.adapter, r.variant) == ("lora", "peft")
        )
    )
    found.append(_line("LoRA (other maths), best of PEFT", "lora", ("peft",)))
    return found


def _line(name: str, family: str, prefixes: tuple[str, ...]) -> Line:
    def takes(row: Row) -> bool:
        return row.adapter == family and row.variant.partition("/")[0] in prefixes

    return Line(name, takes)


def layer_table(rows: list[Row]) -> str:
    """Forward and backward over the frozen layer, by tokens, at the shape with most of them."""
    return _ratio_table([r for r in rows if r.suite == "layer"], "both", lines_for())


def model_table(rows: list[Row]) -> str:
    """Tokens a second in a training step."""
    chosen = [r for r in rows if r.suite == "model" and r.metric == "tokens"]
    chosen = [r for r in chosen if r.clock == "wall" and r.value]
    cases = by_case(chosen)
    frozen = Line("frozen model", lambda row: not row.adapter)
    wanted = [frozen, *(line for line in lines_for() if not line.name.startswith("LoKr"))]
    lines = [["one training step", *(group[0].model for group in cases)]]
    for line in wanted:
        best = [max(_values(group, line), key=_value, default=None) for group in cases]
        if any(best):
            lines.append([line.name, *map(_with_share, best)])
    return markdown(lines) if cases else ""


def start_table(rows: list[Row]) -> str:
    """Milliseconds from a weight to its factors; the gated ones."""
    chosen = [r for r in rows if r.suite == "start" and r.adapter != "floor"]
    cases = by_case([r for r in chosen if r.r == max(c.r for c in chosen)]) if chosen else []
    head = [f"{group[0].n}×{group[0].k} r={group[0].r} {group[0].dtype}" for group in cases]
    lines = [["time to start, one matrix", *head]]
    for name in dict.fromkeys(row.variant for row in chosen):
        line = Line(name, lambda row, name=name: row.variant == name)  # type: ignore[misc]
        best = [min(_values(group, line), key=_value, default=None) for group in cases]
        shown = f"**{name}**" if name.startswith(OURS) else name
        if all(row.status == OTHER for row in chosen if row.variant == name):
            shown += " (other maths)"
        if any(best):
            lines.append(
                [shown, *("–" if r is None else quantity(_value(r), r.unit) for r in best)]
            )
    return markdown(lines) if cases else ""


def _ratio_table(rows: list[Row], metric: str, wanted: list[Line]) -> str:
    chosen = [r for r in rows if r.metric == metric and r.ratio and _best_clock(r, rows)]
    shapes: dict[tuple[object, ...], set[int]] = {}
    for row in chosen:
        if not row.adapter:
            shapes.setdefault((row.n, row.k, row.dtype), set()).add(row.m)
    if not shapes:
        return ""
    shape = max(shapes, key=lambda key: len(shapes[key]))
    tokens = sorted(shapes[shape])
    groups = [[r for r in chosen if (r.n, r.k, r.dtype) == shape and r.m == m] for m in tokens]
    lines = [
        [
            f"forward + backward over frozen, {shape[0]}×{shape[1]} {shape[2]}",
            *(f"M = {m}" for m in tokens),
        ]
    ]
    for line in wanted:
        best = [
            min(_values(group, line), key=lambda r: r.ratio or 0.0, default=None)
            for group in groups
        ]
        if any(best):
            lines.append([line.name, *("–" if r is None else f"{r.ratio:.2f}" for r in best)])
    return markdown(lines)


def _best_clock(row: Row, rows: list[Row]) -> bool:
    """The clock to judge by: CUDA graphs where they were taken, else the device's, else wall."""
    known = {r.clock for r in rows if (r.m, r.n, r.k, r.dtype) == (row.m, row.n, row.k, row.dtype)}
    return row.clock == next(c for c in ("graph", "device", "wall") if c in known)


def _values(rows: list[Row], line: Line) -> list[Row]:
    return [r for r in rows if r.value and r.status not in (RED, SKIPPED) and line.takes(r)]


def _value(row: Row) -> float:
    return row.value or 0.0


def _with_share(row: Row | None) -> str:
    if row is None:
        return "–"
    share = "" if row.ratio is None or not row.adapter else f" ({row.ratio:.2f})"
    return quantity(_value(row), row.unit) + share
