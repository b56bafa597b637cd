"""Our adapters through PEFT beside PEFT's LoRA: one script, dtype and machine.

    python -m bench.peft_table          run what is asked for, then write the table
    python -m bench.peft_table --page   the table alone, from the results that there are

The columns are those of PEFT's own ``method_comparison``, with the seconds of a step beside them;
memory is the process's, since there is no accelerator. The table stands in ``docs/peft.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from finetuning import corpora
from finetuning.cells import Stopped, run_cells
from finetuning.data import write_tsv
from finetuning.report import by_method, seconds, with_spread
from finetuning.settings import Settings

from .machine import REPOSITORY
from .rows import replace_file

METHODS = ("lora", "qr_peft", "lora_xs_peft", "ohora_peft")
TYPES = {
    "lora": "LORA",
    "qr_peft": "QK_QRLORA",
    "lora_xs_peft": "QK_LORAXS",
    "ohora_peft": "QK_OHORA",
}
TASK, TRAIN_ROWS, EVAL_ROWS, EPOCHS = "movies", 1000, 1000, 2
RESULTS = REPOSITORY / "bench" / "results" / "peft.jsonl"
OUT = REPOSITORY / "bench" / "out" / "peft"
PAGE = REPOSITORY / "docs" / "peft.md"
BEGIN, END = "<!-- peft_table:begin -->", "<!-- peft_table:end -->"
HEADER = (
    "experiment_name", "peft_type", "total_time", "train_time", "s / step", "test_accuracy",
    "train_loss", "memory_max", "num_trainable_params", "file_size",
)  # fmt: skip
LAST_STEPS = 20  # whose mean is the loss of the end


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="write the table and run nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    if not args.page:
        try:
            run(args.seeds)
        except Stopped as stopped:
            return stopped.status
    write(PAGE, read(RESULTS))
    print(f"written: {PAGE}")
    return 0


def run(seeds: Sequence[int]) -> None:
    """One run at a time, seed by seed, so that a slow minute does not meet one method alone."""
    files = write_tsv(corpora.load_task(TASK, TRAIN_ROWS, EVAL_ROWS), OUT / "data")
    cells = [
        Settings(
            adapter=method,
            train_file=files[0],
            eval_file=files[1],
            out=OUT / method / f"seed{seed}",
            task=TASK,
            epochs=EPOCHS,
            max_length=64,
            seed=seed,
            progress=False,
            precision="fp32",
        )
        for seed in seeds
        for method in METHODS
    ]
    RESULTS.unlink(missing_ok=True)
    for result in run_cells(cells, OUT / "results.jsonl"):
        print(result["settings"]["adapter"], result["scores"][-1], file=sys.stderr)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_kept(result)) + "\n")


def _kept(result: dict[str, Any]) -> dict[str, Any]:
    """What the table needs, and what one run is known by."""
    settings = {name: result["settings"][name] for name in ("adapter", "seed", "task", "precision")}
    names = "scores trained head rows seconds_to_start seconds_an_epoch adapter_bytes peak_memory"
    steps = len(result["losses"])
    return {
        "settings": settings | {"epochs": len(result["seconds_an_epoch"])},
        **{name: result[name] for name in names.split()},
        "steps": steps,
        "train_loss": round(mean(result["losses"][-LAST_STEPS:]), 4),
        "versions": result["versions"],
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(results: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown, with the settings of the runs below."""
    rows = [_row(label, runs) for label, runs in by_method(results).items()]
    lines = [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1), *rows]
    first, seeds = results[0], {r["settings"]["seed"] for r in results}
    train, held = first["rows"]
    note = (
        f"Times in seconds, the median of {len(seeds)} runs; accuracy of {held:,} sentences after "
        f"{first['settings']['epochs']} epochs of {train:,}, ± over the seeds; train_loss of the "
        f"last {LAST_STEPS} steps; memory of the whole process; num_trainable_params and file_size "
        f"besides the head's {first['head']:,} numbers, which all rows train, files with it. "
        f"{first['settings']['precision']}, query and value of MiniLM-L6; "
        f"{first['versions']['machine']}; torch {first['versions']['torch']}."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}"


def _row(label: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    train = [sum(run["seconds_an_epoch"]) for run in runs]
    steps = [seconds_of_all / run["steps"] for seconds_of_all, run in zip(train, runs, strict=True)]
    memory = [run["peak_memory"] for run in runs if run["peak_memory"] is not None]
    return [
        label,
        TYPES[runs[0]["settings"]["adapter"]],
        f"{median(seconds(run) for run in runs):.1f}",
        f"{median(train):.1f}",
        f"{median(steps):.3f}",
        with_spread(run["scores"][-1]["accuracy"] for run in runs),
        f"{mean(run['train_loss'] for run in runs):.3f}",
        f"{max(memory) / 2**20:.0f} MiB" if memory else "-",
        f"{runs[0]['trained']:,}",
        f"{runs[0]['adapter_bytes']:,} B",
    ]


def write(page: Path, results: Sequence[dict[str, Any]]) -> None:
    """Put the table between the page's marks."""
    put(page, BEGIN, END, table(results))


def put(page: Path, begin: str, end: str, text: str) -> None:
    """Put ``text`` between two marks of ``page``."""
    before, first, rest = page.read_text(encoding="utf-8").partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"{page} must hold {begin} and {end}")
    whole = f"{before}{begin}\n{text}\n{end}{after}"
    replace_file(page, lambda out: out.write(whole))


if __name__ == "__main__":
    sys.exit(main())
