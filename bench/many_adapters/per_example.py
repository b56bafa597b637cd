"""The gradient of each example of a batch, beside a step that has the sum alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from finetuning.corpora import load_task
from torch import Tensor, nn
from tqdm import tqdm

import qrlora_kernels as qk

from .base import adapted, difference, in_turn, milliseconds, ratio, trained
from .sizes import ROWS, Sizes
from .steps import RATE, TASK, Inputs, encoded, inputs_of, own_step

KINDS: dict[str, dict[str, Any]] = {
    "QR-LoRA, default τ": {},
    "LoRA-XS, r = 16": {"method": "lora_xs", "rank": 16},
    "OHoRA": {"method": "ohora"},
}
COMPARED = 4  # examples, with a backward of each alone


def examples(sizes: Sizes) -> dict[str, Any]:
    """A row for each kind of adapter."""
    data = load_task(TASK, ROWS, sizes.held)
    inputs, labels = inputs_of(encoded(data.train, data), list(range(ROWS)))
    bar = tqdm(KINDS.items(), unit="adapter")
    rows = [{"adapter": a, **_measure(options, inputs, labels, sizes)} for a, options in bar]
    return {"rows": rows}


def _measure(
    options: dict[str, Any], inputs: Inputs, labels: Tensor, sizes: Sizes
) -> dict[str, Any]:
    """Milliseconds of both steps, and how far gradients are from those of single examples."""
    model = adapted(head=True, **options)
    plain = own_step(model)
    for _ in range(3):  # away from the start
        plain(inputs, labels)
    largest = _from_singles(model, inputs, labels)
    optimizer = torch.optim.AdamW(trained(model).values(), RATE, weight_decay=0.0)

    def step() -> Tensor:
        optimizer.zero_grad()
        with qk.per_example(model) as found:
            F.cross_entropy(model(**inputs), labels).backward()
        gradients = found.gradients
        optimizer.step()
        return gradients

    tasks = {"each": step, "plain": lambda: plain(inputs, labels)}
    seconds = in_turn(tasks, sizes.rounds)
    return {
        "ratio": ratio(seconds, "each", "plain"),
        "each_ms": milliseconds(seconds["each"]),
        "plain_ms": milliseconds(seconds["plain"]),
        "difference": largest,
    }


def _from_singles(model: nn.Module, inputs: Inputs, labels: Tensor) -> float:
    """The largest difference from the gradients that examples alone have, of some of them."""
    with qk.per_example(model) as found:
        F.cross_entropy(model(**inputs), labels, reduction="sum").backward()
    differences = []
    for row in range(0, ROWS, ROWS // COMPARED):
        model.zero_grad()
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        F.cross_entropy(model(**one), labels[row : row + 1]).backward()
        for name, columns in found.columns.items():
            alone = model.get_parameter(name).grad
            assert alone is not None
            differences.append(difference(found.gradients[row, columns], alone.flatten()))
    return max(differences)
