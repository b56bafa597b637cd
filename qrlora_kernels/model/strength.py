"""How strongly a model's adapters count: for everybody from now on, or not at all for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from ..adapters.options import plain_value
from ..nn import AdapterLinear, switch
from .adapt import require_adapted


def scale(model: nn.Module, strength: float) -> nn.Module:
    """Set how strongly every adapter counts, from now on: its update times ``strength``.

    At 0 the model is exactly its base, at 1 what was trained. Kept by ``save_adapter``.

    Raises
    ------
    TypeError, ValueError
        If ``strength`` is no finite number, or a layer is merged.
    """
    strength = plain_value("strength", "float", strength)
    layers = require_adapted(model)
    refuse_merged(layers)
    for layer in layers.values():
        layer.options = replace(layer.options, strength=strength)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, in this thread, the model answers as its base: a reference model in one memory.

    Bit for bit, in eager mode and compiled, and so far as adapters go: a head that was trained in
    full stays trained. A compiled model computes both answers while it is off anywhere.

    A checkpointed forward is run again by ``backward``, which then belongs inside too, and in this
    thread: on a GPU PyTorch runs it in another, so take no gradient through it there.

    Merged layers keep their update, which is inside their weight: they are refused.

    Raises
    ------
    ValueError
        If no layer is adapted or one is merged.
    """
    layers = require_adapted(model)
    refuse_merged(layers)
    with switch.off(layers.values()):
        yield model


def refuse_merged(layers: dict[str, AdapterLinear]) -> None:
    """Raise where an update is inside a weight, by the layer's name."""
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(
                f"{name} must not be merged, its update is inside its weight: call unmerge() first"
            )
