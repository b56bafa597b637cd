"""docs/benchmarks.md and the README table, written from the recorded rows alone."""

from __future__ import annotations

from pathlib import Path

from . import plots, summary, sweeps, table
from .losses import contests, listed, losses
from .machine import REPOSITORY, slug, spoken
from .registry import SUITES, SWEEPS
from .rows import RED, SKIPPED, Row, read_folder, replace_file
from .shares import shares_table

RESULTS = REPOSITORY / "bench" / "results"
README, PAGE = REPOSITORY / "README.md", REPOSITORY / "docs" / "benchmarks.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

_INTRO = """# Benchmarks

This page is written by `python -m bench pages` from the rows in `bench/results`; no number in it is
typed by hand, and a test fails when the two disagree. To repeat it on another machine:

```
make bench                             # or: python -m bench    under five minutes on two cores
python -m bench --suites grid,pivots   # the two sweeps, a quarter of an hour each on two cores
python -m bench --suites cpu           # a CPU's rivals and floors, some ten minutes on two cores
python -m bench --full --device cuda   # everything; --help lists suites, filters and outputs
python -m bench --record               # into bench/results instead of bench/out
python -m bench pages                  # plots, this page and the README table from bench/results
python -m bench compare OLD NEW        # exits with 1 if anything got worse beyond noise
pytest bench --benchmark-only          # pytest-benchmark's view, which saves and compares
```

How to read it. A cell gives the median, the range from the 20 % to the 80 % quantile, and the
ratio to the **floor**: the same work with the layer frozen (for the start: one product QᵀW). All
variants of a table ran interleaved in one process, after warm-up, in two runs; of a round that was
slow for all of them every sample is divided by how slow it was. "In short" has the medians of the
best variant of each line, and in brackets how many times the floor's that is. Where an alternative
is ahead, [the notes](../bench/notes/bench.md#where-an-alternative-is-ahead) say why.

- **gate**: "green" means that outputs and all gradients were compared with fp64 before anything was
  timed, and are at most twice as far from it as the plain PyTorch expression in the same dtype.
  "RED" rows are wrong and get no ratio. "other maths" is another method: timed, not comparable.
- *frozen* has no adapter, *eager* is the three-line expression, *torch.compile* the same compiled,
  *addmm* the sum inside a library call.
- *peft* is PEFT's default (adapter in fp32), */off* has `autocast_adapter_dtype=False`, */autocast*
  runs under `torch.autocast`.
- *lycoris* rebuilds the weight (its default), */bypass* does not, */kernels* is its Triton kernels.
- `lokr` is OHoRA's product without its start, which is what PEFT and LyCORIS compute.
- *r-kron* is OHoRA's layer with its N × K product formed, the rival that its paper times.
- The suite *cpu* holds the layer against what a processor's library gives by hand, over two floors.
  *frozen packed* is the frozen layer by oneDNN's packed weight; *over frozen* and *over frozen
  packed*, a LoRA of rank 8 over each, tell what an adapter costs from what the matrix product does;
  *frozen prepacked* and *qrlora_kernels prepacked* are after `prepack(packed="both")`.
  *update first* and *base first* say what is added
  onto what, inside oneDNN's product; *output side* works on the base's output alone, *stacked*
  takes h from the same product as y, *one accumulator* makes one sum of both, *effective weight*
  makes W + ΔW once a step. *packed* after a name: all frozen matrices are. In fp32 their sums are
  cut into pieces of at most 512 terms, since long ones are off by twice what PyTorch's are. What
  would be less exact than eager is not run; "Skipped" says why.
- *saved* is what the layer keeps for its backward beyond weights and factors, *peak* what a step
  takes at most beyond what was there before it, *disk* the saved file. On a CPU the peak is one of
  resident pages, libraries' scratch included, to a MiB; in the memory suite each is of a process of
  its own. On a GPU it is torch's allocator's.
- *overhead* is the time of the calling thread for one token through a small layer: what a call
  costs beyond its arithmetic.
"""


def regenerate(check: bool = False) -> list[str]:
    """Bring the page, the README table and the plots up to date.

    Parameters
    ----------
    check : bool
        Write nothing.

    Returns
    -------
    list of str
        The files that were, or with ``check`` would be, changed. Plots are not checked: their bytes
        depend on the version of matplotlib.
    """
    rows = read_folder(RESULTS)
    drawn = plots.names(rows) if check else plots.draw(rows)
    texts = {PAGE: page(rows, drawn), README: readme(README.read_text(), rows)}
    stale = [path for path, text in texts.items() if _current(path) != text]
    if not check:
        for path in stale:
            text = texts[path]
            replace_file(path, lambda out, text=text: out.write(text))  # type: ignore[misc]
    names = [str(path.relative_to(REPOSITORY)) for path in stale]
    return names if check else names + [f"docs/{name}" for name in drawn]


def _current(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def readme(text: str, rows: list[Row]) -> str:
    """``text`` with the short tables between its markers.

    Raises
    ------
    ValueError
        If the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must hold {BEGIN} and {END} once each, in this order")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{short(rows)}{END}{after}"


def short(rows: list[Row]) -> str:
    """What the README shows: the tables that there are rows for, and how many contests were lost.

    A table's heading is the line above it; a machine without a table has none.
    """
    parts = []
    lost = fought = 0
    for machine, group in _machines(rows):
        tables = [text for text in _readers_tables(group) if text]
        parts += [f"On {machine}:", *tables] if tables else []
        lost, fought = lost + len(losses(group)), fought + len(list(contests(group)))
    if fought:
        parts.append(
            "An alternative that gives the same numbers is faster beyond noise in "
            f"{lost or 'none'} of {fought} recorded comparisons; "
            "[docs/benchmarks.md](docs/benchmarks.md) has them all."
        )
    return "\n\n".join(parts) + "\n" if parts else ""


def _readers_tables(rows: list[Row]) -> tuple[str, ...]:
    lines = summary.readers_lines()
    return (
        summary.layer_table(rows, lines),
        summary.model_table(rows, lines),
        summary.start_table(rows, summary.readers_starts()),
    )


def _all_tables(rows: list[Row]) -> tuple[str, ...]:
    """The same with every line."""
    lines = summary.lines_for()
    return (
        summary.layer_table(rows, lines),
        summary.model_table(rows, lines),
        summary.start_table(rows),
    )


def page(rows: list[Row], drawn: list[str]) -> str:
    """docs/benchmarks.md."""
    parts = [_INTRO]
    for machine, group in _machines(rows):
        parts.append(f"\n## {machine}\n")
        parts += [
            f"![{name.rpartition('-')[2]}]({name})" for name in drawn if slug(group[0].chip) in name
        ]
        tables = [text for text in _all_tables(group) if text]
        parts += ["\n### In short\n", "\n\n".join(tables)] if tables else []
        parts.append("\n### Where an alternative is ahead\n")
        parts += listed(group) or [
            f"Nowhere beyond noise in {len(list(contests(group)))} comparisons."
        ]
        parts.append(_exceptions(group))
        parts += [f"\n### {name}\n\n{text}" for name, text in _compact(group) if text]
        for suite in SUITES:
            of_suite = [row for row in group if row.suite == suite]
            if not of_suite:
                continue
            parts.append(f"\n### {suite}")
            for case in table.by_case(of_suite):
                measured = [row for row in case if row.status != SKIPPED]
                parts.append(f"\n{table.title(case[0])}\n\n{table.markdown(table.cells(measured))}")
    return "\n".join(parts) + "\n"


def _compact(rows: list[Row]) -> list[tuple[str, str]]:
    """What would be too long case by case; the rows are all in bench/results."""
    tables = (sweeps.grid_table, sweeps.pivots_table, shares_table)
    found = [(name, make(rows)) for name, make in zip(SWEEPS, tables, strict=True)]
    return [*found, ("overhead per call", sweeps.overhead_table(rows))]


def _exceptions(rows: list[Row]) -> str:
    """What was wrong and what did not run, by name."""
    lines = []
    for status, name in ((RED, "Wrong, so without a ratio"), (SKIPPED, "Skipped")):
        found = dict.fromkeys(
            f"{row.suite} {row.adapter} {row.variant}: {row.note}"
            for row in rows
            if row.status == status
        )
        lines += [f"\n### {name}\n", *(f"- {line}" for line in found)] if found else []
    return "\n".join(lines)


def _machines(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by the chip that they ran on and the commit, with a description of both."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        torch = next(part for part in row.versions.split("; ") if part.startswith("torch"))
        found.setdefault(f"{spoken(row.chip)}, {torch}, commit {row.commit}", []).append(row)
    return list(found.items())
