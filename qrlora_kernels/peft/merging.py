"""Updates inside the base's weight, and the weight that comes back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..nn import base_weight
from ..nn.rounding import round_unbiased
from . import record

if TYPE_CHECKING:
    from .layer import _Linear


@dataclass
class Merge:
    """What a layer's weight was before anything was merged: W - ΔW would have other bits."""

    original: Tensor | None = None  # as it is stored
    merged: Tensor | None = None  # the head of the weight that holds the updates

    def left(self, base: nn.Module) -> None:
        """Note the weight of ``base`` as what the merge left."""
        weight = stored(base)
        self.merged = None if weight.is_meta else record.head_of(weight, base)

    def stands(self, base: nn.Module) -> bool:
        """Whether the weight of ``base`` is what the merge left, or the original that a state dict
        brought."""
        weight = stored(base)
        if self.original is None or self.merged is None or weight.is_meta:
            return True
        here = record.head_of(weight, base)
        before = record.head_of(self.original, base)
        return torch.equal(here, self.merged) or torch.equal(here, before)

    @contextmanager
    def following(self, layer: _Linear, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Follow the weight, which moves to another device or dtype inside."""
        if self.original is None:
            yield
            return
        stood = self.stands(layer.get_base_layer())
        yield
        with torch.no_grad():
            self.original = fn(self.original)
        if stood:
            self.left(layer.get_base_layer())


def stored(base: nn.Module) -> Tensor:
    weight = cast(Tensor, base.weight)
    # A detached one has lost what its library keeps beside it.
    return weight if base_weight.is_quantised(base) else weight.detach()


def original_stored(layer: _Linear) -> Tensor:
    """The base's weight as it is stored, without what was merged."""
    original = layer._merge.original
    return stored(layer.get_base_layer()) if original is None else original


def original_matrix(layer: _Linear) -> Tensor:
    """W [N, K] without what was merged, dequantised."""
    base, original = layer.get_base_layer(), layer._merge.original
    if original is None:
        weight = layer.get_base_weight().detach()
    elif layer.quantization_backend is None:
        weight = original
    else:
        merged = base.weight
        base.weight = original
        try:
            weight = layer.get_base_weight().detach()
        finally:
            base.weight = merged
    return weight.t() if base_weight.is_conv1d(base) else weight


def check_apart(layers: Iterable[tuple[str, _Linear]]) -> None:
    """Raise ValueError where two layers have one weight: each would get the other's update too."""
    owners: dict[nn.Parameter, str] = {}
    for name, layer in layers:
        weight = layer.get_base_layer()._parameters.get("weight")
        if weight is None:
            continue
        other = owners.setdefault(weight, name)
        if other != name:
            raise ValueError(
                f"merging needs a weight of its own in each adapted layer, got one that {other} "
                f"and {name} share: give one of them a copy, or leave the adapters unmerged"
            )


@torch.no_grad()
def merge(layer: _Linear, safe: bool, adapter_names: list[str] | None) -> None:
    """Merge from the original weight and all updates at once, so that it is rounded once.

    Where others changed the weight since it was merged, from what they left.
    """
    names = [n for n in check_adapters_to_merge(layer, adapter_names) or () if layer.has(n)]
    if not names:
        return
    base = layer.get_base_layer()
    if base_weight.is_quantised(base):
        raise ValueError(
            f"{layer.place}.weight must be dense to be merged, got one of the kind "
            f"{base_weight.quantised(base).kind}, whose steps are larger than the update: "
            "dequantise the base first (a transformers model: dequantize()), or keep the adapter "
            "apart"
        )
    stands = layer._merge.stands(base)
    if stands:
        original = original_matrix(layer)
        weight = original.t() if base_weight.is_conv1d(base) else original
    else:
        weight = layer.get_base_weight().detach()
    total = layer.get_delta_weight(names[0])
    for name in (*names[1:], *(layer.merged_adapters if stands else ())):
        total = total + layer.get_delta_weight(name)
    merged = round_unbiased(weight.to(total.dtype) + total.to(weight.device), weight.dtype)
    if safe and not bool(torch.isfinite(merged).all()):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken"
        )
    if layer._merge.original is None:
        layer._merge.original = _held(layer)
    layer.set_base_weight(merged.contiguous())
    layer.merged_adapters.extend(names)
    if stands:
        layer._merge.left(base)


def _held(layer: _Linear) -> Tensor:
    """What is put back: of a quantised base the parameter itself, with its state."""
    base = layer.get_base_layer()
    quantised = layer.quantization_backend is not None
    return base.weight if quantised else base.weight.data


def unmerge(layer: _Linear) -> None:
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        return
    original = layer._merge.original
    assert original is not None
    base = layer.get_base_layer()
    if not layer._merge.stands(base):
        _take_out(layer)
    elif layer.quantization_backend is not None:
        base.weight = original
    else:
        base.weight.data = original
    layer._merge = Merge()
    layer.merged_adapters.clear()


@torch.no_grad()
def _take_out(layer: _Linear) -> None:
    """Subtract the updates from a weight that others changed since: what they did stays."""
    weight = layer.get_base_weight().detach()
    total = torch.stack([layer.get_delta_weight(name) for name in layer.merged_adapters]).sum(0)
    apart = weight.to(total.dtype) - total.to(weight.device)
    layer.set_base_weight(round_unbiased(apart, weight.dtype).contiguous())
