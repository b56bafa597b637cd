"""What a save finds out about a layer, remembered: the next save of an unchanged start is cheap."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..fingerprint import fingerprint, quick_digest
from ..nn import AdapterLinear, base_weight

State = tuple[str, ...]


class Known:
    """Of a layer while its base weight and its factors stay as they are; found when first asked.

    It holds no tensor. The quick digests in ``state`` tell whether it is still about the layer.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._weight: str | None = None
        self._factors: dict[str, str] = {}
        self._rebuilds: bool | None = None

    def fingerprint(self, layer: AdapterLinear, weight: Tensor) -> str:
        if self._weight is None:
            self._weight = base_weight.exact_digest(layer, weight)
        return self._weight

    def digests(self, layer: AdapterLinear) -> dict[str, str]:
        """The fingerprint of each factor."""
        if not self._factors:
            held = layer.frozen_now().items()
            self._factors = {name: fingerprint(factor) for name, factor in held}
        return self._factors

    def rebuilds(self, layer: AdapterLinear, weight: Tensor) -> bool:
        """Whether loading would compute the very bits of the factors."""
        if self._rebuilds is None:
            self._rebuilds = _rebuilds(layer, weight)
        return self._rebuilds


_known: WeakKeyDictionary[AdapterLinear, Known] = WeakKeyDictionary()


def known_of(layer: AdapterLinear, weight: Tensor) -> Known:
    """What is known of ``layer`` as it is; ``weight`` is its base weight as it stores it."""
    factors = layer.frozen_now().values()
    digest = base_weight.digest(layer, weight)
    state = (str(layer.options), digest, *map(quick_digest, factors))
    have = _known.get(layer)
    if have is None or have.state != state:
        have = _known[layer] = Known(state)
    return have


def _rebuilds(layer: AdapterLinear, weight: Tensor) -> bool:
    matrix = base_weight.matrix(layer, weight)
    try:
        kept = {key: getattr(layer, key) for key in layer.adapter.rebuilt_from}
        made = layer.adapter.rebuild(matrix, layer.options, kept)
    except ValueError:
        return False
    return all(
        made[key].dtype == factor.dtype and torch.equal(made[key], factor)
        for key, factor in layer.frozen_now().items()
    )
