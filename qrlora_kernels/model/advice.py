"""What one has to know before training: learning rates, and what the factors take."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from ..nn import QRLinear

LARGE = 1 / 3  # of the weight: more than this in factors is worth a word

# Adapter -> (query and value, all linear layers): rates of AdamW, the best mean of three in the
# tables "The rank rule" and "Learning rates" of docs/papers.md; the second has one seed so far.
RATES: Mapping[str, tuple[float, float]] = {
    "qr": (1e-1, 3e-2),
    "lora_xs": (2e-2, 5e-3),
    "ohora": (2e-2, 1e-2),
}


def trained_at(kind: str) -> str:
    """A sentence on the learning rate of an adapter, which is no LoRA's."""
    some, every = RATES[kind]
    return (
        f"train {kind} at about {some:g} (query and value), {every:g} (all linear layers): at "
        "LoRA's 1e-4 nothing moves"
    )


def tell_large_factors(layers: Mapping[str, nn.Module]) -> None:
    """Warn where a rank rule gives factors of more than a third of the weights they are of."""
    ruled = [
        layer
        for layer in layers.values()
        if isinstance(layer, QRLinear) and layer.options.rank is None
    ]
    weights = sum(layer.weight.numel() for layer in ruled)
    factors = sum(layer.q.numel() + layer.r.numel() for layer in ruled)
    if factors > LARGE * weights:
        ranks = sorted(layer.rank for layer in ruled)
        kept = f"{ranks[0]} to {ranks[-1]}" if ranks[0] < ranks[-1] else f"{ranks[0]}"
        warnings.warn(
            f"the rank rule keeps {kept} directions of each layer, whose "
            f"factors take {factors / weights:.0%} of the memory of the adapted weights: rank=, "
            "max_rank= or another tau makes them smaller",
            stacklevel=3,
        )
