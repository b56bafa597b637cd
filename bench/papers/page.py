"""docs/papers.md and its pictures, written from the results alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import svg
from .records import Record, Records
from .scale import Scale
from .table import Line, MeasuredTable, TrainedTable

_INTRO = """# The papers' tables, in kind

This page is written by `make papers` (`python -m bench.papers --page`) from the rows in
`{results}`; no number of ours in it is typed by hand. The papers' own numbers stand beside ours
where we have them; elsewhere it says "not at hand". Theirs are of larger models and other tasks:
what can be compared is the order of the lines and the counts, not the scores.

The model is {model}. The tasks are sentences rated by people ({tasks}), {train} to
train on and {evaluation} to evaluate on, {epochs} epoch{s} in batches of 16 unless a table says
otherwise, AdamW with a linear schedule, in fp32. Scores are accuracies, for movie-ratings
Pearson's r: the mean ± the standard deviation over the seeds, whose number follows in brackets.
All seeds are evaluated on the same rows; how far so few rows may mislead is beside that: the
standard error of one accuracy near .8 is {error:.3f}. "Trained" leaves out the head, which all
train.
"""

AnyTable = TrainedTable | MeasuredTable


def write(page: Path, tables: Iterable[AnyTable], scale: Scale, records: Records) -> None:
    """Write the page, and the pictures that there are results for, beside it in images/."""
    tables = list(tables)
    parts = [_intro(scale, records.path)]
    without = [table for table in tables if not table.results(scale, records)]
    if without:
        names = ", ".join(f"`{table.name}` ({table.paper})" for table in without)
        parts.append(f"**No rows yet:** {names}.\n")
    parts += [section(table, scale, records, page.parent) for table in tables]
    parts.append(_provenance(tables, scale, records))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts), encoding="utf-8")


def _intro(scale: Scale, results: Path) -> str:
    return _INTRO.format(
        results=f"{results.parent.name}/{results.name}",
        model=f"`{scale.model}`" if scale.model else "MiniLM-L6 (22 M numbers)",
        tasks=", ".join(scale.tasks),
        train=scale.train_rows,
        evaluation=scale.eval_rows,
        epochs=scale.epochs,
        s="s" * (scale.epochs > 1),
        error=(0.8 * 0.2 / scale.eval_rows) ** 0.5,
    )


def section(table: AnyTable, scale: Scale, records: Records, folder: Path) -> str:
    """One table: what it is, its lines and picture, and what could not be shown."""
    results: Sequence[Any] = table.results(scale, records)
    parts = [f"## {table.title}\n", f"`{table.name}` ({table.paper}). {table.about}\n"]
    if not results:
        parts.append("No rows yet.\n")
    else:
        parts.append(markdown(table.lines(scale, results)))
        remark = table.remark(scale, results) if table.remark else ""
        if remark:
            parts.append(remark + "\n")
        picture = _picture(table, scale, results, folder)
        if picture:
            parts.append(f"![{table.title}]({picture})\n")
    missing = _still_missing(table, scale, results)
    parts.append(f"Not shown: {table.not_shown}{missing}\n")
    return "\n".join(parts)


def _still_missing(table: AnyTable, scale: Scale, results: Sequence[Any]) -> str:
    if isinstance(table, MeasuredTable) or not results:
        return ""
    wanted = len({cell.digest() for cell in table.cells(scale)})
    return f" {wanted - len(results)} of {wanted} runs have no row yet." * (len(results) < wanted)


def markdown(lines: Sequence[Line]) -> str:
    """A Markdown table; a line may lack columns of others."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    rows = [[line.get(name, "") for name in columns] for line in lines]
    # | inside a cell would end it.
    text = [[cell.replace("|", "\\|") for cell in row] for row in [columns, *rows]]
    text.insert(1, ["---", *("--:" for _ in columns[1:])])
    return "\n".join("| " + " | ".join(row) + " |" for row in text) + "\n"


def _picture(table: AnyTable, scale: Scale, results: Sequence[Any], folder: Path) -> str:
    """Draw it; its path from the page, or nothing where there is none or no matplotlib."""
    if table.draw is None or importlib.util.find_spec("matplotlib") is None:
        return ""
    draw, name = table.draw, f"images/papers-{table.name}.svg"
    svg.write(folder / name, "papers", lambda figure: draw(figure.add_subplot(), scale, results))
    return name


def _provenance(tables: Sequence[AnyTable], scale: Scale, records: Records) -> str:
    """The processors and versions of every row that is shown."""
    used = [record for table in tables for record in _records_of(table, scale, records)]
    kinds = dict.fromkeys(
        f"{record['cpu']}; "
        + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        for record in used
    )
    if not kinds:
        return "## Where the rows come from\n\nThere are no rows yet.\n"
    days = sorted(record["day"] for record in used)
    listed = "\n".join(f"- {kind}" for kind in kinds)
    return (
        f"## Where the rows come from\n\n{len(used)} rows, {days[0]} to {days[-1]}:\n\n{listed}\n"
    )


def _records_of(table: AnyTable, scale: Scale, records: Records) -> list[Record]:
    if isinstance(table, TrainedTable):
        return [run.record for run in records.runs(table.cells(scale))]
    record = records.find(table.digest(scale))
    return [record] if record else []
