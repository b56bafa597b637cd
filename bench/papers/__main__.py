"""The tables and figures of the three papers, in kind, on MiniLM-L6 and sentences rated by people.

    python -m bench.papers                  all of it: counted at under four hours, two quiet cores
    python -m bench.papers --quick          all of it at a small size: counted at under ten minutes
    python -m bench.papers --table rules    one table (--list names them)
    python -m bench.papers --page           the page alone, from the results that there are

What has a result with the same settings, data and versions is not run again: stop it with Ctrl-C
and go on later. Results are added to bench/results/papers.jsonl, and docs/papers.md is written from
them; with --quick both lie in bench/out/papers.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from finetuning.cells import INTERRUPTED, Stopped, share_cores

from ..machine import REPOSITORY
from .page import AnyTable, write
from .records import Records
from .runner import Workshop
from .scale import FULL, QUICK, Scale
from .tables import TABLES

OUT = REPOSITORY / "bench" / "out" / "papers"
RESULTS = REPOSITORY / "bench" / "results" / "papers.jsonl"
PAGE = REPOSITORY / "docs" / "papers.md"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    args = _parse(argv)
    # PEFT reads a name that transformers renames: nothing that a reader of the page can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    scale = replace(QUICK if args.quick else FULL, model=args.model)
    tables = [TABLES[name] for name in args.table or TABLES]
    path = args.results or (OUT / "quick.jsonl" if args.quick else RESULTS)
    workshop = Workshop(Records.read(path), OUT)
    status = 0
    try:
        if args.list:
            _list(workshop, tables, scale)
            return 0
        if not args.page:
            status = _run(workshop, tables, scale, args.jobs)
    except (Stopped, KeyboardInterrupt):
        status = INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"papers: {error}", file=sys.stderr)
        return 2
    written = args.results.with_suffix(".md") if args.results else _page_of(args.quick)
    write(written, TABLES.values(), scale, workshop.records)
    print(f"written: {written}")
    return status


def _page_of(quick: bool) -> Path:
    return OUT / "papers.md" if quick else PAGE


def _parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m bench.papers",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--table", nargs="+", choices=TABLES, metavar="TABLE", help="of those --list names")
    add("--quick", action="store_true", help="one seed, one task, few sentences")
    add("--list", action="store_true", help="name the tables and how many runs each lacks")
    add("--page", action="store_true", help="write the page from the results and run nothing")
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    add("--model", default="", help="a folder or hub name (default: the packaged MiniLM-L6)")
    add("--results", type=Path, help="a file of JSON lines, the page beside it")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    return args


def _list(workshop: Workshop, tables: list[AnyTable], scale: Scale) -> None:
    for table in tables:
        missing, whole = table.missing(workshop, scale)
        print(f"{table.name:16} {missing:4} of {whole:4} runs to do   {table.title}")


def _run(workshop: Workshop, tables: list[AnyTable], scale: Scale, jobs: int) -> int:
    share_cores(jobs)
    failed = 0
    for table in tables:
        print(f"== {table.name}: {table.title}", flush=True)
        failed += table.run(workshop, scale, jobs)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
