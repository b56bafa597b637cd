"""What one has to know before training: learning rates, and what the factors take."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from ..adapters import Options
from ..nn import QRLinear
from ..nn.quantised import shape_of

LARGE = 1 / 3  # of the weight: more than this in factors is worth a word

# Adapter -> (query and value, all linear layers): rates of AdamW, the best mean of three in the
# tables "The rank rule" and "Learning rates" of docs/papers.md.
RATES: Mapping[str, tuple[float, float]] = {
    "qr": (1e-1, 3e-2),
    "lora_xs": (2e-2, 1e-2),
    "ohora": (2e-2, 1e-2),
}


def trained_at(kind: str) -> str:
    """A sentence on the learning rate of an adapter, which is no LoRA's."""
    some, every = RATES[kind]
    return (
        f"train {kind} at about {some:g} (query and value), {every:g} (all linear layers): at "
        "LoRA's 1e-4 nothing moves"
    )


def followed(options: Mapping[str, Options]) -> str:
    """What more is to be said of layers whose weight has changed, with their options; or nothing.

    ΔW of two factors stays what it was, and one that is made of W goes with it.
    """
    names = [name for name, one in options.items() if one.form == "output"]
    if not names:
        return ""
    return f". With factors='output' the updates of {', '.join(names)} are others as well"


def tell_large_factors(layers: Mapping[str, nn.Module]) -> None:
    """Warn where a rank rule gives factors of more than a third of the weights they are of."""
    ruled = [
        layer
        for layer in layers.values()
        if isinstance(layer, QRLinear) and layer.options.rank is None
    ]
    weights = sum(shape_of(layer.weight).numel() for layer in ruled)
    matrices = (f for layer in ruled for f in layer.frozen_now().values() if f.dim() == 2)
    factors = sum(factor.numel() for factor in matrices)
    warn_if_large(weights, factors, [layer.rank for layer in ruled], "rank=, max_rank=")


def warn_if_large(weights: int, factors: int, ranks: Sequence[int], ways: str) -> None:
    """Warn where ``factors`` elements are more than a third of ``weights``, with ``ways`` out."""
    if factors > LARGE * weights:
        low, high = min(ranks), max(ranks)
        kept = f"{low} to {high}" if low < high else f"{low}"
        warnings.warn(
            f"the rank rule keeps {kept} directions of each layer, whose "
            f"factors take {factors / weights:.0%} of the memory of the adapted weights: {ways} or "
            "another tau makes them smaller",
            stacklevel=4,
        )
