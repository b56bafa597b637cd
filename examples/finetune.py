"""Fine-tune a head over a frozen encoder with QR-LoRA, LoRA-XS, OHoRA, LoRA, or the head alone.

    python examples/finetune.py --demo
    python examples/finetune.py --adapter qr --tau 0.5 --data pairs.tsv --eval-data dev.tsv
    python examples/finetune.py --adapter qr lora --task rte --model roberta-base

The first runs all five. Without --data or --task the text is found on this machine: sentence pairs
mined from the docstrings of the installed libraries (do the two document the same object?). Every
adapter runs in a process of its own, so that times and peak memory are its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path

from finetuning import data, plots, report
from finetuning.settings import ADAPTERS, NAMES, Settings

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    args = parse(argv)
    try:
        train_file, eval_file = data.write_tsv(load_data(args), args.out / "data")
        runs = [settings_of(args, name, train_file, eval_file) for name in chosen(args)]
    except (ValueError, OSError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    results: list[report.Result] = []
    status = 0
    for settings in runs:
        if results:  # decide once, so that all runs are alike
            settings = replace(settings, precision=results[0]["settings"]["precision"])
        print(f"== {NAMES[settings.adapter]}", flush=True)
        status = run_alone(settings)
        if status:
            break
        results.append(report.read_result(settings.result_file))
    if results:
        show(results, args.out)
    return status


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--demo", action="store_true", help="the same as --adapter all")
    add("--adapter", nargs="+", default=["qr"], choices=[*ADAPTERS, "all"])
    add("--model", default="", help="a folder or hub name (default: the packaged MiniLM-L6)")
    add("--data", type=Path, help="TSV with a header: one or two texts, and a label or score")
    add("--eval-data", type=Path, help="the same for evaluation (default: 15 %% of --data)")
    add("--task", choices=sorted(data.GLUE), help="a GLUE task, through the package datasets")
    add("--pairs", type=int, default=1600, help="training pairs to mine (default %(default)s)")
    add("--eval-pairs", type=int, default=500, help="and to evaluate on (default %(default)s)")
    add("--targets", default="query,value", help='names, one regular expression or "all-linear"')
    add("--rank", type=int, help="of the adapter (default: its own rule)")
    add("--tau", type=float, help="QR-LoRA: keep |R_ii| > tau |R_11| (default 0.5)")
    add("--lr", type=float, help="learning rate of the adapter (default: its own)")
    add("--head-lr", type=float, default=Settings.head_lr)
    add("--epochs", type=int, default=Settings.epochs)
    add("--batch-size", type=int, default=Settings.batch_size)
    add("--max-length", type=int, default=Settings.max_length, help="tokens of an input")
    add("--seed", type=int, default=Settings.seed)
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="bf16: autocast")
    add("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    add("--out", type=Path, default=Path("runs"), help="output folder (default %(default)s)")
    add("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


def load_data(args: argparse.Namespace) -> data.Data:
    if args.data is not None and args.task is not None:
        raise ValueError("--data and --task exclude each other")
    if args.data is not None:
        return data.read_tsv(args.data, args.eval_data, args.seed)
    if args.task is not None:
        return data.read_glue(args.task)
    return data.mined(args.pairs, args.eval_pairs, args.seed, progress=not args.quiet)


def chosen(args: argparse.Namespace) -> list[str]:
    """The adapters to run; "all" leaves PEFT's LoRA out where PEFT is not installed."""
    every = args.demo or "all" in args.adapter
    names = list(ADAPTERS) if every else list(dict.fromkeys(args.adapter))
    if "lora" not in names or importlib.util.find_spec("peft") is not None:
        return names
    if not every:
        raise ValueError("adapter 'lora' needs the package peft: pip install peft")
    print("PEFT is not installed: its LoRA is left out of the comparison", file=sys.stderr)
    return [name for name in names if name != "lora"]


def settings_of(
    args: argparse.Namespace, adapter: str, train_file: Path, eval_file: Path
) -> Settings:
    same = ("model", "rank", "lr", "head_lr", "epochs", "batch_size", "max_length", "seed")
    return Settings(
        adapter=adapter,
        train_file=train_file,
        eval_file=eval_file,
        out=args.out / adapter,
        targets=tuple(args.targets.split(",")) if "," in args.targets else (args.targets,),
        tau=args.tau if adapter == "qr" else None,
        precision=args.precision,
        device=args.device,
        progress=not args.quiet,
        **{name: getattr(args, name) for name in same},
    )


def run_alone(settings: Settings) -> int:
    """One run in a fresh process; its exit status."""
    process = multiprocessing.get_context("spawn").Process(target=child, args=(settings,))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.join()  # Ctrl-C reached it too; it says what it left behind
        return INTERRUPTED
    if process.exitcode is not None and process.exitcode < 0:
        print(f"finetune.py: the run was killed by signal {-process.exitcode}", file=sys.stderr)
        return 1
    return process.exitcode or 0


def child(settings: Settings) -> None:
    # Threads that spin while they wait slow every other job on the machine, and each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not settings.model or Path(settings.model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing to ask the hub for
    from finetuning.run import Interrupted, ReloadError, fine_tune

    try:
        fine_tune(settings)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, TypeError, ReloadError, FloatingPointError, ImportError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        sys.exit(1)


def show(results: list[report.Result], out: Path) -> None:
    """Print the table of the finished runs; write it and the picture."""
    text = report.table(results)
    print(f"\n{text}\n")
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    written = [str(out / "table.md")]
    if plots.draw(results, out / "picture.png"):
        written.append(str(out / "picture.png"))
    else:
        print("no picture: matplotlib is not installed")
    print("written: " + ", ".join([*written, f"{out}/*/result.json"]))


if __name__ == "__main__":
    sys.exit(main())
