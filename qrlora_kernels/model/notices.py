"""What a user would not see: heads left frozen, weights passed over, layers that are gone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence

from torch import nn

from ..nn import AdapterLinear
from ..nn.base_weight import is_linear_like
from . import memory
from .names import modules, under, within
from .targets import bypassed

# transformers' classes whose head is drawn anew for the task.
TASK_MODEL = re.compile(
    r"For\w*(Classification|Answering\w*|MultipleChoice|Regression|CTC|XVector|Detection"
    r"|Segmentation)$"
)
MUCH = 0.2  # a share of the weights that is worth a word
SOME = 0.02  # a share that is named once there is a word


def task_head(root: nn.Module) -> list[str]:
    """Names of the modules that a task added to a pretrained model of transformers.

    In ``root`` itself, in a model for a task that it holds, or beside a pretrained model.
    """
    here = modules(root)
    found: list[str] = []
    for name, module in here.items():
        if TASK_MODEL.search(type(module).__name__) and _is_pretrained(module):
            found += [f"{name}.{child}" if name else child for child in _beside_body(module)]
    if not _is_pretrained(root):
        found += _beside_pretrained(root)
    return found


def _is_pretrained(module: nn.Module) -> bool:
    """Whether it is one of transformers' models, whole."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__)


def _beside_body(module: nn.Module) -> list[str]:
    """The children of a model for a task that are not the pretrained body."""
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in module.named_children()}
    body = getattr(module, "base_model_prefix", "")
    if body not in sizes:  # some classes have their body under another name
        body = max(sizes, key=lambda name: sizes[name], default="")
    return [name for name, size in sizes.items() if size and name != body]


def _beside_pretrained(root: nn.Module) -> list[str]:
    """The children with linear layers of a user's own module around pretrained models."""
    children = dict(root.named_children())
    if not any(_is_pretrained(child) for child in children.values()):
        return []
    return [
        name
        for name, child in children.items()
        if not any(_is_pretrained(m) for m in child.modules())
        and any(is_linear_like(m) for m in child.modules())
    ]


def tell_frozen_head(root: nn.Module, head: Sequence[str], skip: Sequence[str]) -> None:
    """Warn of a head that may be as it was drawn and of which something does not train."""
    here = modules(root)
    frozen = [n for n in head if not within(n, skip) and not _trains(here[n])]
    if frozen:
        warnings.warn(
            f"{type(root).__name__} has a head for its task that stays frozen, or part of it does: "
            f"{', '.join(frozen)}. Unless the checkpoint brought it, it is as it was drawn at "
            f"random: train it with trainable={frozen}",
            stacklevel=3,
        )


def _trains(module: nn.Module) -> bool:
    """Whether all its parameters train, those that an adapter freezes among them."""
    adapters = {
        id(getattr(layer, key))
        for layer in module.modules()
        if isinstance(layer, AdapterLinear)
        for key in layer.trainables
    }
    return all(p.requires_grad or id(p) in adapters for p in module.parameters())


def tell_passed_over(root: nn.Module, head: Sequence[str]) -> None:
    """Warn of many weights that "all-linear" could not adapt."""
    missed: dict[str, tuple[int, str]] = {}  # by kind: how many numbers, and the first name
    here, known, adapted = modules(root), set[int](), 0
    for name, module in here.items():
        for size, kind in _weights(name, here, known):
            if isinstance(module, AdapterLinear):
                adapted += size
            elif not under(name, head):
                before, first = missed.get(kind, (0, name))
                missed[kind] = before + size, first
    lost = sum(size for size, _ in missed.values())
    total = lost + adapted
    if lost <= MUCH * total:
        return
    largest = sorted(missed.items(), key=lambda item: -item[1][0])
    named = [f"{kind} ({name})" for kind, (size, name) in largest if size > SOME * total]
    warnings.warn(
        f"'all-linear' passed over {lost / total:.0%} of the weights, which are in no linear layer "
        f"that can be adapted: those of {', '.join(named)}",
        stacklevel=3,
    )


def _weights(name: str, here: dict[str, nn.Module], known: set[int]) -> Iterator[tuple[int, str]]:
    """Sizes of the matrices and larger tensors in a module, each with the kind of its owner."""
    module = here[name]
    parent = bypassed(name, here) if is_linear_like(module) else ""
    if isinstance(module, nn.Embedding) or (
        is_linear_like(module) and not parent and not isinstance(module, AdapterLinear)
    ):
        return  # embeddings, and the layers that the user or the output embedding keep out
    for key, p in module._parameters.items():
        own = isinstance(module, AdapterLinear) and key != "weight"
        if p is None or p.dim() < 2 or id(p) in known or own:
            continue
        known.add(id(p))
        yield p.numel(), parent.removeprefix("nn.") or type(module).__name__


def lost(model: nn.Module) -> str:
    """Which layers were adapted that something has replaced since, in words; empty if none."""
    names = ", ".join(memory.lost(model))
    return names and f"no longer adapted, because another module was put there since: {names}"


def tell_lost(model: nn.Module) -> None:
    """Warn of them."""
    gone = lost(model)
    if gone:
        warnings.warn(gone, stacklevel=3)
