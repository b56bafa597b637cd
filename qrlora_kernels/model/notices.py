"""What a user would not see: heads left frozen, weights passed over, layers that are gone."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict

from torch import nn

from . import memory
from .names import modules, within

# transformers' classes whose head is drawn anew for the task.
TASK_MODEL = re.compile(r"For\w*(Classification|Answering|MultipleChoice|Regression)$")
MUCH = 0.2  # a share of the weights that is worth a word


def task_head(root: nn.Module) -> list[str]:
    """Names of the modules that a task added to a pretrained model of transformers."""
    prefix = getattr(root, "base_model_prefix", "")
    if not (prefix and hasattr(root, prefix) and TASK_MODEL.search(type(root).__name__)):
        return []
    return [
        name
        for name, child in root.named_children()
        if name != prefix and next(child.parameters(), None) is not None
    ]


def tell_passed_over(
    root: nn.Module, targets: object, layers: dict[str, nn.Module], head: list[str]
) -> None:
    """Warn of a fresh head that nothing trains, and of many weights that "all-linear" missed."""
    frozen = [n for n in head if not any(p.requires_grad for p in modules(root)[n].parameters())]
    frozen = [n for n in frozen if not any(within(name, [n]) for name in layers)]
    if frozen:
        warnings.warn(
            f"{type(root).__name__} has a head for its task that stays frozen as it was drawn: "
            f"train it with trainable={frozen}",
            stacklevel=3,
        )
    if targets == "all-linear":
        _tell_missed(root, layers, head)


def _tell_missed(root: nn.Module, layers: dict[str, nn.Module], head: list[str]) -> None:
    adapted = {id(layer.weight) for layer in layers.values()}
    missed: dict[str, int] = defaultdict(int)
    kinds: dict[str, str] = {}
    for name, module in modules(root).items():
        for key, p in module._parameters.items():
            if p is None or p.dim() < 2 or id(p) in adapted or within(name, head):
                continue
            if isinstance(module, (nn.Embedding, nn.Linear)):
                continue  # the output embedding and what the user left out are named elsewhere
            missed[f"{name}.{key}"] += p.numel()
            kinds[type(module).__name__] = name
    total = sum(missed.values()) + sum(layer.weight.numel() for layer in layers.values())  # type: ignore[operator, misc]
    share = sum(missed.values()) / max(total, 1)
    if share > MUCH:
        warnings.warn(
            f"'all-linear' passed over {share:.0%} of the weights, which are no linear layers: "
            f"those of {', '.join(f'{kind} ({name})' for kind, name in kinds.items())}",
            stacklevel=4,
        )


def lost(model: nn.Module) -> str:
    """Which layers were adapted that something has replaced since, in words; empty if none."""
    names = ", ".join(memory.lost(model))
    return names and f"no longer adapted, because another module was put there since: {names}"


def tell_lost(model: nn.Module) -> None:
    """Warn of them."""
    gone = lost(model)
    if gone:
        warnings.warn(gone, stacklevel=3)
