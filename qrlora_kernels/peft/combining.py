"""Sums of adapters that begin from the same factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..adapters.combining import NO_SUM, require_low_rank, weighted_sum
from ..adapters.options import plain_value
from . import record
from .config import AdapterConfig
from .held import Made
from .layer import _Linear

if TYPE_CHECKING:
    from .tuner import AdapterModel


@dataclass
class Combined:
    config: AdapterConfig
    made: dict[str, Made]


def combine(
    tuner: AdapterModel, names: Sequence[str], weights: Sequence[float], how: str
) -> Combined:
    """The config and the tensors of Σ wᵢ ΔWᵢ; see ``AdapterModel.add_weighted_adapter``."""
    weights = _checked(tuner, names, weights, how)
    made: dict[str, Made] = {}
    for layer_name, layer in tuner.model.named_modules():
        if isinstance(layer, tuner.tuner_layer_cls):
            here = [(n, w) for n, w in zip(names, weights, strict=True) if layer.has(n)]
            if here:
                made[layer_name] = _sum(layer_name, layer, here)
    first = tuner.peft_config[names[0]]
    ranks = {name: first.adapter.rank(one.state) for name, one in made.items()}
    by_rank: dict[str, Any] = {"tau": None} if hasattr(first, "tau") else {}
    config = replace(
        first,
        r=max(ranks.values()),  # type: ignore[call-arg]
        target_modules=list(made),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=ranks,
        alpha=None,
        alpha_pattern={},
        modules_to_save=None,
        trainable_token_indices=None,
        bias="none",
        **by_rank,
    )
    return Combined(config, made)


def _checked(
    tuner: AdapterModel, names: Sequence[str], weights: Sequence[float], how: str
) -> list[float]:
    if how != "linear":
        raise ValueError(
            f"combination_type must be 'linear', which is exact over shared factors, got {how!r}"
        )
    if not names or len(names) != len(weights):
        raise ValueError(
            f"adapters and weights must be as many, and one at least, got {len(names)} and "
            f"{len(weights)}"
        )
    unknown = sorted(set(names) - set(tuner.peft_config))
    if unknown:
        raise ValueError(f"Adapter {', '.join(unknown)} does not exist")
    require_low_rank(tuner.tuner_layer_cls.adapter, f"{NO_SUM}; merge them one after another")
    return [plain_value("weights", "float", weight) for weight in weights]


def _sum(name: str, layer: _Linear, parts: Sequence[tuple[str, float]]) -> Made:
    for n, _ in parts:
        layer.compare(n)
    starts = {layer.factors_of.used[n] for n, _ in parts}
    if len(starts) > 1:
        raise ValueError(
            f"adapters must begin from the same factors to be combined, got others in {name}: "
            f"{', '.join(n for n, _ in parts)}"
        )
    largest = max((n for n, _ in parts), key=layer.r.__getitem__)
    (own,) = layer.adapter_layer_names
    held = getattr(layer, own)
    scaled = [weight * layer.scaling[n] for n, weight in parts]
    total = weighted_sum([held[n] for n, _ in parts], scaled, layer.r[largest])
    (trainable,) = layer.adapter.trainables
    state = layer.factors(largest) | {trainable: total}
    return Made(layer.options[largest], 1.0, state, record.head(layer.expected[largest]))
