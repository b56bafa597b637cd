"""Fine-tune a head over a frozen encoder with QR-LoRA, LoRA-XS, OHoRA and what they compare with.

    python examples/finetune.py --demo
    python examples/finetune.py --adapter qr lora full --task tweets --seeds 0 1 2
    python examples/finetune.py --adapter qr --rank-rule energy --tau 0.5 --layers last:4
    python examples/finetune.py --adapter qr --data mine.tsv --eval-data dev.tsv
    python examples/finetune.py --adapter qr lora --task rte --model roberta-base

The first is a comparison of five on sentences of movie reviews, three seeds each. Its sentences,
and those of the other tasks named here, are downloaded once from PyPI with pip. Every run has a
process of its own, so that its times and peak memory are its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetuning import corpora, data, plots, report
from finetuning.cells import Stopped, run_cells
from finetuning.methods import DEMO, METHODS, OPTIONS
from finetuning.settings import ALL_LAYERS, Settings

TASKS = [*corpora.TASKS, *data.GLUE]
# So much that five methods and three seeds take less than four minutes on two quiet cores.
DEMO_DEFAULTS: dict[str, Any] = {
    "adapter": list(DEMO),
    "seeds": [0, 1, 2],
    "jobs": min(os.cpu_count() or 1, 4),
    "train_rows": 400,
    "eval_rows": 300,
    "epochs": 2,
    "batch_size": 16,
    "max_length": 64,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    args = parse(argv)
    try:
        names = chosen(args.adapter)
        check_taken(args, names)
        files = data.write_tsv(load_data(args), args.out / "data")
        cells = [
            settings_of(args, name, seed, files)
            for name in names
            for seed in dict.fromkeys(args.seeds)
        ]
    except (ValueError, OSError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    results: list[report.Result] = []
    try:
        # A run that fails leaves the results of those before it in the list.
        wanted = announced(cells) if args.jobs == 1 else cells
        results.extend(run_cells(wanted, args.out / "results.jsonl", args.jobs))
    except Stopped as stopped:
        return stopped.status
    finally:
        if results:
            show(results, args.out, args.jobs)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_data(parser.add_argument_group("data"))
    _add_training(parser.add_argument_group("training"))
    _add_options(
        parser.add_argument_group("options of the methods, each given to those that take it")
    )
    if parser.parse_args(argv).demo:
        parser.set_defaults(**DEMO_DEFAULTS)
    return parser.parse_args(argv)


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--demo", action="store_true", help="five methods, three seeds")
    about = "; ".join(f"{name}: {task.about}" for name, task in corpora.TASKS.items())
    add(
        "--task", choices=TASKS, metavar="TASK", help=f"{about}; or of GLUE: {', '.join(data.GLUE)}"
    )
    add("--data", type=Path, help="TSV with a header: one or two texts, and a label or score")
    add("--eval-data", type=Path, help="the same for evaluation (default: 15 %% of --data)")
    add("--train-rows", type=int, default=3000, help="at most (default %(default)s)")
    add("--eval-rows", type=int, default=1000, help="(default %(default)s)")
    add("--out", type=Path, default=Path("runs"), help="output folder (default %(default)s)")


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    names = ", ".join(METHODS)
    add(
        "--adapter",
        nargs="+",
        default=["qr"],
        choices=[*METHODS, "all"],
        metavar="METHOD",
        help=f"one or several of {names}, or all (default qr)",
    )
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    add("--seeds", type=int, nargs="+", default=[0], help="one run each (default 0)")
    add("--model", default="", help="a folder or hub name (default: the packaged MiniLM-L6)")
    add("--targets", default="query,value", help='names, one regular expression or "all-linear"')
    add("--layers", default=ALL_LAYERS, help='"all" or, for the last four, "last:4"')
    add("--lr", type=float, help="learning rate of the adapter (default: its own)")
    add("--head-lr", type=float, default=Settings.head_lr, help="and of the head")
    add("--epochs", type=int, default=Settings.epochs, help="(default %(default)s)")
    add("--warmup-epochs", type=int, default=0, help="of full fine-tuning before (default 0)")
    add("--batch-size", type=int, default=Settings.batch_size, help="rows of a step")
    add("--max-length", type=int, default=Settings.max_length, help="tokens of an input")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="bf16: autocast")
    add("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    add("--quiet", action="store_true", help="no progress bars")


def _add_options(group: argparse._ArgumentGroup) -> None:
    for name, option in OPTIONS.items():
        flag = "--" + (option.flag or name.replace("_", "-"))
        if option.type is bool:
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": option.type, "choices": option.choices or None}
        group.add_argument(flag, dest=name, help=option.help, **how)


def load_data(args: argparse.Namespace) -> data.Data:
    if args.data is not None and args.task is not None:
        raise ValueError("--data and --task exclude each other")
    if args.eval_data is not None and args.data is None:
        raise ValueError("--eval-data needs --data")
    if args.data is not None:
        return data.read_tsv(args.data, args.eval_data)
    if args.task in data.GLUE:
        return data.read_glue(args.task)
    return corpora.load_task(
        args.task or next(iter(corpora.TASKS)), args.train_rows, args.eval_rows
    )


def chosen(adapters: Sequence[str]) -> list[str]:
    """The methods to run; "all" leaves PEFT's out where PEFT is not installed, as the demo does."""
    names = list(METHODS) if "all" in adapters else list(dict.fromkeys(adapters))
    peft = [name for name in names if METHODS[name].provider == "peft"]
    if not peft or importlib.util.find_spec("peft") is not None:
        return names
    if "all" not in adapters and names != list(DEMO):
        raise ValueError(f"adapter {peft[0]!r} needs the package peft: pip install peft")
    print("PEFT is not installed: its adapters are left out of the comparison", file=sys.stderr)
    return [name for name in names if name not in peft]


def check_taken(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Each option given is one that a chosen method takes, and there is a run at a time."""
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    taken = {option for name in names for option in METHODS[name].options}
    for option in OPTIONS:
        if getattr(args, option) is not None and option not in taken:
            takers = [name for name, method in METHODS.items() if option in method.options]
            raise ValueError(f"{option} is an option of {', '.join(takers)}, got {list(names)}")


def settings_of(
    args: argparse.Namespace, adapter: str, seed: int, files: tuple[Path, Path]
) -> Settings:
    same = "model layers lr head_lr epochs warmup_epochs batch_size max_length precision device"
    given = {name: getattr(args, name) for name in METHODS[adapter].options}
    task = args.task or (args.data.name if args.data is not None else next(iter(corpora.TASKS)))
    return Settings(
        adapter=adapter,
        train_file=files[0],
        eval_file=files[1],
        out=args.out / adapter / f"seed{seed}",
        task=task,
        targets=tuple(args.targets.split(",")) if "," in args.targets else (args.targets,),
        options={name: value for name, value in given.items() if value is not None},
        warmup_folder=args.out / "warmed",
        seed=seed,
        progress=not args.quiet,
        **{name: getattr(args, name) for name in same.split()},
    )


def announced(cells: Sequence[Settings]) -> Iterator[Settings]:
    """The cells, each of which is told as it is taken."""
    for settings in cells:
        print(f"== {METHODS[settings.adapter].label}, seed {settings.seed}", flush=True)
        yield settings


def show(results: list[report.Result], out: Path, jobs: int) -> None:
    """Print the table of the finished runs; write it and the picture."""
    text = report.table(results)
    if jobs > 1:
        text += f"\n{jobs} runs at a time."
    print(f"\n{text}\n")
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    written = [str(out / "table.md")]
    if plots.draw(results, out / "picture.png"):
        written.append(str(out / "picture.png"))
    else:
        print("no picture: matplotlib is not installed")
    print("written: " + ", ".join([*written, str(out / "results.jsonl")]))


if __name__ == "__main__":
    sys.exit(main())
