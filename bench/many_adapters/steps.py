"""One step of many tenants, of one, and of one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from finetuning.corpora import load_task
from finetuning.data import Data, Split
from finetuning.model import load_tokenizer
from finetuning.training import Encoded, encode
from torch import Tensor, nn

import qrlora_kernels as qk

from .base import in_turn, milliseconds, put, ratio, trained
from .sizes import ROWS, Sizes

TASK, MAX_LENGTH = "movies", 64
RATE = 2e-2
Inputs = dict[str, Tensor]


def encoded(split: Split, data: Data) -> Encoded:
    return encode(load_tokenizer(""), split, data.values(split), MAX_LENGTH)


def inputs_of(data: Encoded, rows: list[int]) -> tuple[Inputs, Tensor]:
    return data.batch(rows), data.targets[rows].long()


def mixed_step(bank: qk.AdapterBank) -> Callable[[list[str], Inputs, Tensor], None]:
    optimizer = bank.adamw(RATE, weight_decay=0.0)

    def step(names: list[str], inputs: Inputs, labels: Tensor) -> None:
        optimizer.zero_grad()
        with bank.use(names) as batch:
            losses = F.cross_entropy(bank.model(**inputs), labels, reduction="none")
            batch.mean(losses).backward()
        optimizer.step()

    return step


def own_step(model: nn.Module) -> Callable[[Inputs, Tensor], None]:
    optimizer = torch.optim.AdamW(trained(model).values(), RATE, weight_decay=0.0)

    def step(inputs: Inputs, labels: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(**inputs), labels).backward()
        optimizer.step()

    return step


def step_times(model: nn.Module, tenants: int, sizes: Sizes) -> dict[str, Any]:
    """ROWS rows of ``tenants`` in one step, as one tenant's, and tenant by tenant."""
    data = load_task(TASK, ROWS, sizes.held)
    rows, each = encoded(data.train, data), ROWS // tenants
    start = {name: p.detach().clone() for name, p in trained(model).items()}
    bank = qk.AdapterBank(model, tenants)
    for tenant in range(tenants):
        bank.add(f"tenant {tenant}")
    names = [f"tenant {row // each}" for row in range(ROWS)]
    whole = inputs_of(rows, list(range(ROWS)))
    parts = [inputs_of(rows, list(range(at, at + each))) for at in range(0, ROWS, each)]
    mixed, own = mixed_step(bank), own_step(model)

    def one_by_one() -> None:
        for inputs, labels in parts:
            own(inputs, labels)

    tasks = {
        "together": lambda: mixed(names, *whole),
        "one": lambda: own(*whole),
        "one_by_one": one_by_one,
    }
    seconds = in_turn(tasks, sizes.rounds)
    put(model, start)
    return {
        "tenants": tenants,
        "together_ms": milliseconds(seconds["together"]),
        "one_ms": milliseconds(seconds["one"]),
        "one_by_one_ms": milliseconds(seconds["one_by_one"]),
        "ratio": ratio(seconds, "together", "one"),
    }
