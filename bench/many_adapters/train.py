"""Tenants trained in one bank: what each reaches, against each trained by itself."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch
from finetuning.corpora import load_task
from finetuning.training import Encoded
from torch import Tensor, nn
from tqdm import tqdm

import qrlora_kernels as qk

from .base import adapted, lora_numbers, put, trained
from .sizes import EACH, ROWS, Sizes
from .steps import TASK, encoded, inputs_of, mixed_step, own_step, step_times

Batch = dict[str, list[int]]  # the rows of each tenant


def train(sizes: Sizes) -> dict[str, Any]:
    """Scores both ways, seconds of a step, and what training keeps of a tenant."""
    model = adapted(head=True)
    numbers = sum(p.numel() for name, p in trained(model).items() if not name.startswith("head."))
    return {
        "numbers": numbers,
        "state_bytes": 3 * 4 * numbers,  # the numbers and two moments
        "lora_state_bytes": 3 * 4 * lora_numbers(model),
        **_scores(model, sizes),
        "steps": [step_times(model, tenants, sizes) for tenants in sizes.in_batch],
    }


def _scores(model: nn.Module, sizes: Sizes) -> dict[str, Any]:
    """Mean accuracy of the tenants of one bank, and of the same steps of each by itself."""
    data = load_task(TASK, sizes.tenants * sizes.sentences, sizes.held)
    rows, held = encoded(data.train, data), encoded(data.evaluation, data)
    batches = list(_batches(sizes))
    start = {name: p.detach().clone() for name, p in trained(model).items()}
    bank = _trained_together(model, rows, batches, sizes)
    together, alone, differences = [], [], []
    for name in tqdm(bank.names(), desc="each by itself", unit="tenant"):
        put(model, start)
        own = [batch[name] for batch in batches if name in batch]
        _train_alone(model, rows, own)
        alone.append(_accuracy(model, held))
        own_state = {n: p.detach().clone() for n, p in trained(model).items()}
        put(model, bank.state(name))
        together.append(_accuracy(model, held))
        differences.append(_apart(bank.state(name), own_state, start))
    put(model, start)
    return {
        "tenants": sizes.tenants,
        "sentences": sizes.sentences,
        "held": sizes.held,
        "steps_of_each": sizes.epochs * sizes.sentences // EACH,
        "before": _accuracy(model, held),
        "together": mean(together),
        "alone": mean(alone),
        "largest_score_difference": max(abs(a - b) for a, b in zip(together, alone, strict=True)),
        "difference": max(differences),
    }


def _batches(sizes: Sizes) -> Iterator[Batch]:
    """EACH rows of as many tenants as a batch has room for; all rows of all in an epoch."""
    generator = torch.Generator().manual_seed(0)
    share = torch.randperm(sizes.tenants * sizes.sentences, generator=generator)
    shares = share.reshape(sizes.tenants, sizes.sentences)
    for _ in range(sizes.epochs):
        order = torch.stack([torch.randperm(sizes.sentences, generator=generator) for _ in shares])
        for chunk in shares.gather(1, order).split(EACH, 1):
            tenants = torch.randperm(sizes.tenants, generator=generator)
            for some in tenants.split(ROWS // EACH):
                yield {f"tenant {t}": chunk[t].tolist() for t in some.tolist()}


def _trained_together(
    model: nn.Module, data: Encoded, batches: list[Batch], sizes: Sizes
) -> qk.AdapterBank:
    bank = qk.AdapterBank(model, sizes.tenants)
    for tenant in range(sizes.tenants):
        bank.add(f"tenant {tenant}")
    step = mixed_step(bank)
    for batch in tqdm(batches, desc="in one bank", unit="step"):
        names = [name for name, rows in batch.items() for _ in rows]
        step(names, *inputs_of(data, [row for rows in batch.values() for row in rows]))
    return bank


def _train_alone(model: nn.Module, data: Encoded, batches: list[list[int]]) -> None:
    step = own_step(model)
    for rows in batches:
        step(*inputs_of(data, rows))


@torch.no_grad()
def _accuracy(model: nn.Module, held: Encoded) -> float:
    order = sorted(range(len(held.targets)), key=held.length)
    hits = 0
    for at in range(0, len(order), ROWS):
        inputs, labels = inputs_of(held, order[at : at + ROWS])
        hits += int((model(**inputs).argmax(1) == labels).sum())
    return hits / len(order)


def _apart(found: dict[str, Tensor], own: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest step of all from the start."""
    moved = {name: tensor - start[name] for name, tensor in own.items()}
    flat = [torch.cat([s[n].flatten() for n in start]) for s in (found, own, moved)]
    return float((flat[0] - flat[1]).abs().max() / flat[2].abs().max())
