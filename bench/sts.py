"""Does each adapter learn? Caption similarity on MiniLM-L6 over several seeds, against PEFT's LoRA.

    python -m bench.sts --data ../shared/data/sts-captions

The folder holds train.tsv and dev.tsv with two sentences and a score. Every method trains query and
value for four epochs under the same head, batches and schedule. Prints one table, writes one JSON
row a run, and exits with 1 unless every adapter is .20 Pearson above the head alone and QR-LoRA is
within .03 of LoRA r = 2.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from .machine import REPOSITORY, facts

sys.path.insert(0, str(REPOSITORY / "examples"))

from finetuning.methods import DEMO, METHODS
from finetuning.report import write_result
from finetuning.run import fine_tune
from finetuning.settings import Settings
from finetuning.training import faster_precision

RATES = {"none": 0.0, "qr": 3e-2, "lora_xs": 1e-2, "ohora": 1e-2, "lora": 2e-3}
OPTIONS: dict[str, dict[str, Any]] = {
    "qr": {"tau": 0.5},
    "lora_xs": {"rank": 16},
    "ohora": {"rank": 16},
    "lora": {"rank": 2},
}
ABOVE_HEAD = 0.20  # least gain in Pearson over the head alone
BELOW_LORA = 0.03  # largest loss of QR-LoRA against LoRA


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/sts-captions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench/results/sts.json")
    args = parser.parse_args()
    if not (args.data / "train.tsv").is_file():
        print(f"sts.py: no train.tsv and dev.tsv in {args.data}: name --data", file=sys.stderr)
        return 2
    precision = faster_precision("cpu")
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for adapter in DEMO:
            print(f"== {METHODS[adapter].label}, seed {seed}", flush=True)
            rows.append(_run(adapter, seed, args, precision))
            write_result(args.out, {"rows": rows})
    print("\n" + _table(rows))
    problems = _problems(rows)
    print("\n".join(problems) or "every adapter learns as it should")
    return 1 if problems else 0


def _run(adapter: str, seed: int, args: argparse.Namespace, precision: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            adapter=adapter,
            train_file=args.data / "train.tsv",
            eval_file=args.data / "dev.tsv",
            out=Path(folder),
            lr=RATES[adapter],
            epochs=args.epochs,
            seed=seed,
            precision=precision,
            progress=False,
            options=OPTIONS.get(adapter, {}),
        )
        result = fine_tune(settings)
    return {
        "adapter": adapter,
        "seed": seed,
        "trained": result["trained"],
        "options": {"lr": RATES[adapter], "epochs": args.epochs, **OPTIONS.get(adapter, {})},
        **result["scores"][-1],
        "epoch_pearson": [scores["pearson"] for scores in result["scores"]],
        "seconds_an_epoch": mean(result["seconds_an_epoch"]),
        "reload_difference": result["reload_difference"],
        "precision": precision,
        **facts(),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    header = ["method", "trained", *(f"seed {seed}" for seed in seeds), "mean"]
    lines = [header, ["---", *("--:" for _ in header[1:])]]
    for adapter in DEMO:
        own = [row for row in rows if row["adapter"] == adapter]
        values = [row["pearson"] for row in sorted(own, key=lambda row: row["seed"])]
        cells = [f"{value:.3f}" for value in (*values, mean(values))]
        lines.append([METHODS[adapter].label, f"{own[0]['trained']:,}", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _problems(rows: list[dict[str, Any]]) -> list[str]:
    """What falls short of the two requirements, seed by seed."""
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        pearson = {row["adapter"]: row["pearson"] for row in rows if row["seed"] == seed}
        for adapter in ("qr", "lora_xs", "ohora"):
            gain = pearson[adapter] - pearson["none"]
            if gain < ABOVE_HEAD:
                found.append(
                    f"seed {seed}: {METHODS[adapter].label} is only {gain:.3f} above the head"
                )
        if pearson["qr"] < pearson["lora"] - BELOW_LORA:
            found.append(f"seed {seed}: QR-LoRA {pearson['qr']:.3f}, LoRA {pearson['lora']:.3f}")
    return found


if __name__ == "__main__":
    sys.exit(main())
