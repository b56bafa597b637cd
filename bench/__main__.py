"""``python -m bench``: run suites, compare two runs, regenerate plots and pages."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from . import machine, table
from .competitors.ours import each_backend
from .pages import regenerate, short
from .registry import (
    ADAPTERS,
    DTYPES,
    NEIGHBOURS,
    SUITES,
    SWEEPS,
    AnyCase,
    Effort,
    cases,
    effort_for,
)
from .rows import RED, Row, replace_file, write
from .shares import shares_table
from .suites import cpu, decode, grid, layer, memory, model, overhead, pivots, start
from .suites.common import Options

RESULTS = machine.REPOSITORY / "bench" / "results"
OUT = machine.REPOSITORY / "bench" / "out"
_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
RUN: dict[str, Callable[..., list[Row]]] = {
    "layer": layer.run,
    "decode": decode.run,
    "overhead": overhead.run,
    "start": start.run,
    "memory": memory.run,
    "model": model.run,
    "grid": grid.run,
    "pivots": pivots.run,
    "cpu": cpu.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the three commands; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["compare"]:
        return _compare(arguments[1:])
    if arguments[:1] == ["pages"]:
        return _pages(arguments[1:])
    return _run(_parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m bench",
        description="Time adapters over frozen linear layers against their alternatives.",
        epilog="Other commands: 'python -m bench compare OLD NEW' exits with 1 if anything got "
        "worse beyond noise; 'python -m bench pages' redraws plots, docs/benchmarks.md and the "
        "README table from bench/results.",
    )
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument(
        "--quick", dest="effort", action="store_const", const="quick", help="a case per suite"
    )
    effort.add_argument(
        "--full", dest="effort", action="store_const", const="full", help="every case, long"
    )
    parser.set_defaults(effort="short")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument(
        "--suites",
        type=_one_of((*SUITES, *SWEEPS)),
        metavar="A,B",
        help=f"{', '.join(SUITES)}; with --full also, or by name, the sweeps {', '.join(SWEEPS)}",
    )
    parser.add_argument(
        "--dtypes", type=_one_of(tuple(DTYPES)), default=(), metavar="A,B", help=", ".join(DTYPES)
    )
    families = (*ADAPTERS, *NEIGHBOURS)
    parser.add_argument(
        "--adapters", type=_one_of(families), default=(), metavar="A,B", help=", ".join(families)
    )
    parser.add_argument(
        "--variants", type=_list, default=(), metavar="A,B", help="parts of 'adapter variant'"
    )
    parser.add_argument("--cases", default="", help="part of a case, such as 'M=512 1024x1024'")
    parser.add_argument(
        "--backends", type=_list, default=(), metavar="A,B", help="also pin this package to these"
    )
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--cold", dest="cold", action="store_true", help="evict caches (GPU default)"
    )
    cache.add_argument("--warm", dest="cold", action="store_false")
    parser.set_defaults(cold=None)
    parser.add_argument("--seconds", type=float, help="per case, instead of the effort's own")
    parser.add_argument("--gate-only", action="store_true", help="check results, time nothing")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for CSV and JSON")
    parser.add_argument("--record", action="store_true", help="write to bench/results instead")
    parser.add_argument("--list", action="store_true", help="print what would run")
    return parser


def _list(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _one_of(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        chosen = _list(text)
        for part in chosen:
            if part not in allowed:
                raise argparse.ArgumentTypeError(f"choose from {', '.join(allowed)}, got {part!r}")
        return chosen

    return parse


def _run(chosen: argparse.Namespace) -> int:
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(f"--device cuda: torch {torch.__version__} sees no GPU here\n")
        return 2
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
        os.environ["OPENBLAS_NUM_THREADS"] = str(chosen.threads)  # scipy's, not yet imported
    suites = chosen.suites or (*SUITES, *(SWEEPS if chosen.effort == "full" else ()))
    plan = [(suite, case) for suite in suites for case in _cases(suite, chosen)]
    if chosen.list or not plan:
        print("\n".join(f"{suite}: {case}" for suite, case in plan) or "nothing matches")
        return 0 if plan else 2
    options = Options(
        device=chosen.device,
        adapters=chosen.adapters,
        variants=chosen.variants,
        cold=chosen.device == "cuda" if chosen.cold is None else chosen.cold,
        gate_only=chosen.gate_only,
        full=chosen.effort == "full",
    )
    efforts = {suite: effort_for(suite, chosen.effort) for suite in suites}
    if chosen.seconds:
        efforts = {suite: replace(e, seconds=chosen.seconds) for suite, e in efforts.items()}
    folder = RESULTS if chosen.record else chosen.out
    with each_backend(list(chosen.backends)):
        rows, failed = _measure(plan, efforts, options, folder)
    red = [row for row in rows if row.status == RED]
    names = sorted({f"{row.suite} {row.adapter} {row.variant}" for row in red})
    if not chosen.gate_only:
        replace_file(chosen.out / "summary.md", lambda out: out.write(short(rows)))
        print(short(rows))
        print(shares_table(rows))
    print(f"{len(rows)} rows in {folder}" + "".join(f"\nRED: {name}" for name in names))
    print("".join(f"FAILED: {name}\n" for name in failed), end="")
    return 1 if failed or (red and chosen.gate_only) else 0


def _cases(suite: str, chosen: argparse.Namespace) -> list[AnyCase]:
    return [
        case
        for case in cases(chosen.device, suite, chosen.effort, chosen.gate_only)
        if chosen.cases in str(case) and (not chosen.dtypes or case.dtype in chosen.dtypes)
    ]


def _measure(
    plan: list[tuple[str, AnyCase]], efforts: dict[str, Effort], options: Options, folder: Path
) -> tuple[list[Row], list[str]]:
    """Run the plan suite by suite; files are written after each case, so a stop loses little."""
    rows: list[Row] = []
    failed: list[str] = []
    begin, weights = time.monotonic(), [case.weight for _, case in plan]
    bar = tqdm(total=sum(weights), smoothing=0.0, disable=None, bar_format=_BAR)
    with bar, contextlib.suppress(KeyboardInterrupt):
        for number, (suite, case) in enumerate(plan):
            bar.set_description(f"{number + 1}/{len(plan)} {suite}: {case}")
            end = sum(weights[: number + 1])

            def tick(share: float, weight: float = case.weight, end: float = end) -> None:
                bar.update(min(share * weight, max(end - bar.n, 0.0)))

            try:
                found = RUN[suite](case, replace(options, effort=efforts[suite], tick=tick))
            except Exception:  # the cases that follow are still worth having
                tqdm.write(f"{suite}: {case} failed\n{traceback.format_exc()}")
                failed.append(f"{suite}: {case}")
                continue
            bar.update(end - bar.n)
            if not found:  # no variant of this name in the suite
                continue
            rows += found
            tqdm.write(table.text(found) + "\n")
            done = [row for row in rows if row.suite == suite]
            path = folder / f"{machine.slug(found[0].chip)}-{suite}.csv"
            write(done, path, twin=folder != RESULTS)
    tqdm.write(f"{time.monotonic() - begin:.0f} s")
    return rows, failed


def _compare(arguments: list[str]) -> int:
    from .compare import report

    parser = argparse.ArgumentParser("python -m bench compare")
    parser.add_argument("old", type=Path, help="CSV or JSON of a run, or a folder of CSV files")
    parser.add_argument("new", type=Path)
    chosen = parser.parse_args(arguments)
    text, status = report(chosen.old, chosen.new)
    print(text)
    return status


def _pages(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench pages")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if outdated")
    chosen = parser.parse_args(arguments)
    outdated = regenerate(check=chosen.check)
    print("\n".join(f"{'outdated' if chosen.check else 'wrote'}: {name}" for name in outdated))
    return 1 if chosen.check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
