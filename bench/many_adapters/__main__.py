"""Many adapters over one MiniLM-L6: served, trained, and the gradient of each example.

    python -m bench.many_adapters                all of it, then the tables and the picture
    python -m bench.many_adapters --part serve   one part; the others' results stay
    python -m bench.many_adapters --quick        all of it, so small that it shows it runs
    python -m bench.many_adapters --page         tables and picture, from the results there are

Nothing is timed before its numbers were compared: rows of a mixed batch with each adapter alone,
tenants of one bank with runs of each, gradients with those of single examples. A part whose
numbers differ is not written. Results are kept in bench/results, and the tables are in
docs/many_adapters.md; with --quick the results are in bench/out and the tables are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..machine import REPOSITORY, facts
from ..rows import replace_file
from . import page
from .per_example import examples
from .serve import serve
from .sizes import FULL, QUICK, Sizes
from .train import train

PARTS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "serve": serve,
    "train": train,
    "examples": examples,
}
RESULTS = REPOSITORY / "bench" / "results" / "many_adapters.json"
QUICK_RESULTS = REPOSITORY / "bench" / "out" / "many_adapters.json"
LIMIT = 1e-4  # of what differs by rounding alone
SCORE_LIMIT = 1e-3  # of a mean accuracy: some answers are on the edge


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 1 where numbers differ."""
    args = _parse(argv)
    path = QUICK_RESULTS if args.quick else RESULTS
    results, wrong = read(path), []
    for name in [] if args.page else args.part or PARTS:
        print(f"== {name}", file=sys.stderr, flush=True)
        sizes = QUICK if args.quick else FULL
        found = {**PARTS[name](sizes), "sizes": asdict(sizes), "machine": facts()}
        problems = differences(name, found)
        wrong += problems
        if not problems:
            results[name] = found
            text = json.dumps(results, indent=1) + "\n"
            replace_file(path, lambda out, text=text: out.write(text))  # type: ignore[misc]
    if args.quick:
        print(page.text(results))
    else:
        page.write(page.PAGE, results)
        print(f"written: {page.PAGE}")
    for problem in wrong:
        print(f"wrong, and not written: {problem}", file=sys.stderr)
    return 1 if wrong else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m bench.many_adapters",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, help="of these alone")
    parser.add_argument("--quick", action="store_true", help="small, and kept apart")
    parser.add_argument("--page", action="store_true", help="run nothing")
    return parser.parse_args(argv)


def read(path: Path) -> dict[str, Any]:
    """The results by part; none where there is no file."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def differences(name: str, found: dict[str, Any]) -> list[str]:
    """What differs by more than rounding may; NaN differs."""
    if name == "train":
        apart = abs(found["together"] - found["alone"])
        return [] if apart <= SCORE_LIMIT else [f"train: mean scores differ by {apart:.1e}"]
    rows = found.get("rows", [found])
    return [
        f"{name}: {row.get('adapter', '')} differs by {row['difference']:.1e}"
        for row in rows
        if not row["difference"] <= LIMIT
    ]


if __name__ == "__main__":
    sys.exit(main())
