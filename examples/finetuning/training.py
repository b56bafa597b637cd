"""The training loop: batches of similar length, AdamW with a linear schedule, autocast."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .data import Split
from .settings import Settings

WARMUP = 0.1  # share of the steps
EVALUATED = 64  # rows of a batch
POOL = 16  # batches that are sorted by length together


@dataclass
class Encoded:
    """A tokenised split; ``inputs`` are lists, padded batch by batch."""

    tokenizer: Any
    inputs: dict[str, list[list[int]]]
    targets: Tensor

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """The tokenizer's tensors for ``rows``, each [len(rows), tokens of the longest]."""
        picked = {name: [values[row] for row in rows] for name, values in self.inputs.items()}
        return dict(self.tokenizer.pad(picked, return_tensors="pt"))

    def length(self, row: int) -> int:
        return len(self.inputs["input_ids"][row])


@dataclass
class Log:
    """What a run leaves behind: one loss a step, one of the others an epoch."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    predictions: Tensor = field(default_factory=lambda: torch.empty(0))  # of the last epoch


def encode(tokenizer: Any, split: Split, values: list[float], max_length: int) -> Encoded:
    inputs = tokenizer(*split.texts, truncation=True, max_length=max_length)
    return Encoded(tokenizer, dict(inputs), torch.tensor(values))


def shuffled(data: Encoded, size: int, generator: torch.Generator) -> list[list[int]]:
    """Random batches of rows; sorting within a pool of batches saves most of the padding."""
    order = torch.randperm(len(data.targets), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), POOL * size):
        pool = sorted(order[start : start + POOL * size], key=data.length)
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def train(
    model: nn.Module,
    data: Encoded,
    settings: Settings,
    log: Log,
    after_epoch: Callable[[int], None],
) -> None:
    """Train what requires grad; ``after_epoch`` is called with the number of epochs done.

    A model with one output fits the targets scaled to unit variance by squared error, others by
    cross-entropy.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    steps = settings.epochs * math.ceil(len(data.targets) / settings.batch_size)
    optimizer = make_optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    targets = data.targets.to(settings.device)
    for epoch in range(settings.epochs):
        model.train()
        start = time.perf_counter()
        batches = shuffled(data, settings.batch_size, generator)
        bar = tqdm(batches, f"epoch {epoch + 1}/{settings.epochs}", disable=not settings.progress)
        for rows in bar:
            loss = loss_of(predict_batch(model, data, rows, settings), targets, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            log.losses.append(loss.item())
            if not math.isfinite(log.losses[-1]):
                raise FloatingPointError(f"the loss is {log.losses[-1]}: try a smaller --lr")
            bar.set_postfix(loss=f"{log.losses[-1]:.3f}", refresh=False)
        log.seconds.append(time.perf_counter() - start)
        after_epoch(epoch + 1)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, with rates of their own for head and adapter.

    No weight decay: it would pull OHoRA's factors away from their start towards zero.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    head = [p for n, p in named if n.startswith("head.")]
    adapter = [p for n, p in named if not n.startswith("head.")]
    groups = [{"params": head, "lr": settings.head_lr}]
    if adapter:
        groups.append({"params": adapter, "lr": settings.learning_rate})
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    return min((step + 1) / (WARMUP * steps + 1), 1.0) * (1.0 - step / steps)


def loss_of(outputs: Tensor, targets: Tensor, rows: list[int]) -> Tensor:
    """Of the outputs of ``rows``; see :func:`train`."""
    if outputs.shape[1] > 1:
        return F.cross_entropy(outputs, targets[rows].long())
    scaled = (targets[rows] - targets.mean()) / targets.std()
    return F.mse_loss(outputs[:, 0], scaled)


def predict_batch(model: nn.Module, data: Encoded, rows: list[int], settings: Settings) -> Tensor:
    inputs = {name: tensor.to(settings.device) for name, tensor in data.batch(rows).items()}
    with torch.autocast(settings.device_type, torch.bfloat16, enabled=settings.precision == "bf16"):
        return model(**inputs)


def predict(model: nn.Module, data: Encoded, settings: Settings) -> Tensor:
    """Predictions [rows, outputs] in fp32 on the CPU, in the order of the rows."""
    batches = evaluation_batches(data)
    rows = torch.tensor([row for batch in batches for row in batch])
    return predict_batches(model, data, batches, settings)[rows.argsort()]


def evaluation_batches(data: Encoded) -> list[list[int]]:
    """All rows, those of similar length together."""
    order = sorted(range(len(data.targets)), key=data.length)
    return [order[i : i + EVALUATED] for i in range(0, len(order), EVALUATED)]


@torch.no_grad()
def predict_batches(
    model: nn.Module, data: Encoded, batches: list[list[int]], settings: Settings
) -> Tensor:
    """Predictions of the rows of ``batches`` in their order."""
    model.eval()
    return torch.cat([predict_batch(model, data, rows, settings).cpu() for rows in batches])


def faster_precision(device: str) -> str:
    """ "bf16" where autocast pays: measured on one layer, its casts included."""
    x, weight = torch.randn(1024, 384, device=device), torch.randn(1536, 384, device=device)
    fp32 = _best_time(lambda: F.linear(x, weight))
    bf16 = _best_time(lambda: F.linear(x.bfloat16(), weight.bfloat16()))
    return "bf16" if bf16 < 0.75 * fp32 else "fp32"


def _best_time(run: Callable[[], Tensor]) -> float:
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        run().sum().item()  # waits for an accelerator
        best = min(best, time.perf_counter() - start)
    return best
