"""The tables of the sweeps and of the overhead per call, from the recorded rows."""

from __future__ import annotations

from collections.abc import Iterable

from .losses import NAMES, OURS, contests, losses
from .rows import OK, OTHER, Row
from .table import by_case, markdown, quantity

CLOSE = 1.02  # as near to the best alternative as a table can tell
_LIST = "one call"


def grid_table(rows: list[Row]) -> str:
    """Ours and the best alternative over the frozen layer, for every size, tokens and rank."""
    chosen = [r for r in rows if r.suite == "grid" and r.metric == "both"]
    cells = {_grid_key(ours): (ours, best) for ours, best in contests(chosen)}
    if not cells:
        return ""
    sides = sorted({ours.n for ours, _ in cells.values()})
    lines = [["forward + backward", "M", "r", *(f"{side}²" for side in sides)]]
    for dtype, adapter, r, m in sorted({key[:4] for key in cells}, key=_in_order):
        shown = [_grid_cell(cells.get((dtype, adapter, r, m, side))) for side in sides]
        lines.append([f"{NAMES[adapter]} {dtype}", str(m), "r_high" if r < 0 else str(r), *shown])
    ratios = [(ours.value or 0.0) / (best.value or 1.0) for ours, best in cells.values()]
    close = sum(ratio <= CLOSE for ratio in ratios)
    behind = len(losses(chosen))
    return (
        "A cell is ours / best alternative, each over the frozen layer of the same row, and in "
        f"brackets ours over the best alternative, bold above {CLOSE}. Alternatives: eager, addmm, "
        "and, where ours ran a kernel, this package's library products without it.\n\n"
        f"{markdown(lines)}\n\n"
        f"At most {CLOSE} of the best alternative in {close} of {len(ratios)}; behind it beyond "
        f"noise in {behind}."
    )


def _grid_key(row: Row) -> tuple[str, str, int, int, int]:
    """(dtype, adapter, r, M, size): OHoRA's rank follows from the size, so it is one line."""
    return row.dtype, row.adapter, -1 if row.adapter == "ohora" else row.r, row.m, row.n


def _in_order(line: tuple[str, str, int, int]) -> tuple[str, int, int, int]:
    dtype, adapter, r, m = line
    return dtype, list(NAMES).index(adapter), m, r


def _grid_cell(found: tuple[Row, Row] | None) -> str:
    if found is None:
        return "–"
    ours, best = found
    over = (ours.value or 0.0) / (best.value or 1.0)
    text = f"({over:.2f})" if over <= CLOSE else f"(**{over:.2f}**)"
    return f"{_ratio(ours)} / {_ratio(best)} {text}"


def _ratio(row: Row) -> str:
    return "–" if row.ratio is None else f"{row.ratio:.2f}"


def pivots_table(rows: list[Row]) -> str:
    """Ours, how many times longer LAPACK takes, and what memory ours needs."""
    rows = [r for r in rows if r.suite == "pivots" and r.status == OK and r.value]
    starts = [r for r in rows if r.metric == "start"]
    rivals = [v for v in dict.fromkeys(r.variant for r in starts) if _is_rival(v)]
    lines = [["matrix", "r", "this package", *(f"{name}, times" for name in rivals), "peak"]]
    for group in by_case(starts):
        for ours in (r for r in group if r.adapter and r.variant.startswith(OURS)):
            if ours.model:
                continue
            same = {r.variant: r for r in group if r.r == ours.r}
            peak = [r for r in rows if r.metric == "peak" and _same(r, ours)]
            lines.append(
                [
                    f"{ours.n}×{ours.k} {ours.dtype}",
                    "all" if ours.r == min(ours.n, ours.k) else str(ours.r),
                    quantity(ours.value or 0.0, ours.unit),
                    *(_times(same.get(name), ours) for name in rivals),
                    quantity(peak[0].value or 0.0, "B") if peak else "–",
                ]
            )
    if len(lines) == 1:
        return ""
    return "\n\n".join([markdown(lines), *_lists(starts)])


def _is_rival(variant: str) -> bool:
    return not variant.startswith(OURS) and _LIST not in variant


def _same(one: Row, other: Row) -> bool:
    return (*one.case(), one.variant, one.r) == (*other.case(), other.variant, other.r)


def _times(row: Row | None, ours: Row) -> str:
    return "–" if row is None else f"{(row.value or 0.0) / (ours.value or 1.0):.1f}"


def _lists(starts: Iterable[Row]) -> list[str]:
    """A sentence for each list that was factorised in one call."""
    found = []
    for group in by_case(r for r in starts if r.model):
        loop, ours = (next(r for r in group if bool(r.adapter) is own) for own in (False, True))
        found.append(
            f"A list in one call, {ours.model}: {quantity(ours.value or 0.0, ours.unit)}, "
            f"{quantity(loop.value or 0.0, loop.unit)} with one call each "
            f"({(loop.value or 0.0) / (ours.value or 1.0):.2f} times), the same bits."
        )
    return found


def overhead_table(rows: list[Row]) -> str:
    """Microseconds of a call above ``F.linear``'s, without and with a graph for backward."""
    rows = [r for r in rows if r.suite == "overhead" and r.value and r.status in (OK, OTHER)]
    if not rows:
        return ""
    lines = [["µs a call above F.linear", "no_grad", "grad"]]
    for group in by_case(rows):
        floor = {r.metric: r.value or 0.0 for r in group if not r.adapter}
        found: dict[tuple[str, str], dict[str, float]] = {}
        for row in (r for r in group if r.adapter):
            above = (row.value or 0.0) - floor[row.metric]
            found.setdefault((row.adapter, row.variant), {})[row.metric] = above
        for (adapter, variant), cost in found.items():
            shown = "**this package**" if variant == OURS else variant
            name = f"{NAMES[adapter]} {group[0].dtype}, {shown}"
            lines.append([name, *(f"{cost[m]:.1f}" for m in ("no_grad", "grad"))])
        lines.append(
            [f"(F.linear itself, {group[0].dtype})", *(f"{floor[m]:.1f}" for m in lines[0][1:])]
        )
    return markdown(lines)
