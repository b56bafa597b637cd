"""The models that are measured, and timing in turn."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from finetuning.model import load_model
from torch import Tensor, nn

import qrlora_kernels as qk

TARGETS = ["query", "value"]
LORA_RANK = 8  # of PEFT's LoRA over the same layers, whose bytes stand beside ours
RANKS: dict[str, dict[str, Any]] = {"QR-LoRA, r = 8": {"rank": 8}, "QR-LoRA, default τ": {}}


def adapted(head: bool, method: str = "qr", **options: Any) -> nn.Module:
    """MiniLM-L6 under a head of two classes, which trains where ``head`` says so."""
    model, trainable = load_model("", 2, 0), ["head"] if head else []
    with warnings.catch_warnings():  # the head is frozen, and the rank large, on purpose
        warnings.simplefilter("ignore", UserWarning)
        return qk.adapt(model, TARGETS, method, trainable=trainable, progress=False, **options)


def lora_numbers(model: nn.Module) -> int:
    """What LoRA of rank 8 would train over the adapted layers."""
    layers = qk.adapted_layers(model).values()
    return sum(LORA_RANK * sum(layer.weight.shape) for layer in layers)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the model's own adapter these numbers."""
    for name, parameter in trained(model).items():
        parameter.copy_(state[name])


def in_turn(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call; each round calls all, in an order that turns, after one to warm up."""
    names = list(tasks)
    for task in tasks.values():
        task()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                tasks[name]()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """The median over the rounds, whose calls met the same minute of the machine."""
    pairs = zip(seconds[over], seconds[under], strict=True)
    return round(median(a / b for a, b in pairs), 3)


def milliseconds(seconds: list[float], quantile: float = 0.5) -> float:
    all_of_them = torch.tensor(seconds, dtype=torch.float64)
    return round(float(all_of_them.quantile(quantile)) * 1e3, 2)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest number that is expected."""
    return float((found - expected).abs().max() / expected.abs().max())
