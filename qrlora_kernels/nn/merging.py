"""The weight of an adapted layer over time: merged or not, converted, or changed by others.

``merged`` looks and is no flag: it is true while the layer's weight is the very tensor that
``merge`` made, unchanged since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..fingerprint import quick_digest
from . import base_weight, offload
from .rounding import round_unbiased

if TYPE_CHECKING:
    from .layer import AdapterLinear


class Merge(NamedTuple):
    """What ``merge`` did: the weight that it put in, that weight's version, and the original."""

    weight: nn.Parameter
    version: int
    original: nn.Parameter
    away: bool  # each forward of an offloaded layer brings a new tensor


def holds(layer: AdapterLinear) -> bool:
    """Whether the layer's weight is that of its merge record."""
    record = layer._merge
    if record is None:
        return False
    return record.away or (
        layer.weight is record.weight and record.weight._version == record.version
    )


def forward(layer: AdapterLinear, x: Tensor) -> Tensor:
    """A merged layer's: the product with its weight."""
    if layer.training and torch.is_grad_enabled():
        raise RuntimeError(
            "a merged layer cannot train: its update is inside the weight; call unmerge()"
        )
    return layer.base_forward(x)


@torch.no_grad()
def merge(layer: AdapterLinear) -> None:
    if layer.merged:
        return
    with base_weight.present(layer):
        original = layer.weight
        merged = nn.Parameter(_merged_weight(layer), requires_grad=False)
    away = offload.is_away(layer)
    base_weight.replace_weight(layer, merged)
    layer._merge = Merge(merged, merged._version, original, away)


def unmerge(layer: AdapterLinear) -> None:
    record, holding = layer._merge, holds(layer)
    # In place over the merged weight: the original is what the layer goes back to all the same.
    if record is not None and (holding or layer.weight is record.weight):
        base_weight.replace_weight(layer, record.original)
    layer._merge = None


@torch.no_grad()
def merged_parameter(layer: AdapterLinear) -> nn.Parameter:
    """A parameter of its own with W + ΔW."""
    with base_weight.present(layer):
        data = layer.weight.clone() if layer.merged else _merged_weight(layer)
    return nn.Parameter(data, requires_grad=False)


def _merged_weight(layer: AdapterLinear) -> Tensor:
    if layer._merge is not None and layer.weight is layer._merge.weight:
        raise ValueError(
            "the merged weight must not be written to, but it was changed in place after merge(): "
            "call unmerge() to go back to the original"
        )
    if layer._strength == 0.0:
        return layer.weight.detach().clone()
    delta = layer.delta_weight()
    weight = layer.weight.to(delta.dtype) + (delta.t() if layer.conv1d else delta)
    merged = round_unbiased(weight, layer.weight.dtype).contiguous()
    if not bool(torch.isfinite(merged).all()):
        bad = int((~torch.isfinite(merged)).sum())
        raise ValueError(
            f"W + ΔW must be finite in {merged.dtype} to be merged, got {bad} elements of "
            f"{merged.numel()} that are not"
        )
    return merged


# --- the weight that the factors came from


def base_changed(layer: AdapterLinear) -> bool:
    """Whether the base weight has other bits than when the factors were made or loaded."""
    if layer._start is None:
        return False
    record = layer._merge
    if record is not None and layer.merged:
        return quick_digest(record.original) != layer._start
    with base_weight.present(layer):
        return base_weight.digest(layer) != layer._start


@contextmanager
def converted(layer: AdapterLinear, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Around a cast or a move of all the layer's tensors: its account of the weight stays true."""
    record, dtype = layer._merge, layer.weight.dtype
    merged, changed = layer.merged, None
    original = record.original if record is not None and merged else None
    target = fn(torch.empty(0, dtype=dtype, device=layer.weight.device)).dtype
    if target != dtype:
        changed = base_changed(layer)  # asked while the bits are the ones that were digested
    yield
    if original is not None and record is not None:
        kept = _converted(original, fn)
        weight = layer.weight
        layer._merge = Merge(weight, weight._version, kept, record.away)
    elif record is not None:
        layer._merge = None
    if changed is False and not layer.base_weight.is_meta:
        layer._start = quick_digest(layer.base_weight)


def _converted(weight: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """``fn`` of a parameter outside the module, in place where it can be: it may be tied."""
    data = fn(weight.data)
    if not torch._has_compatible_shallow_copy_type(weight.data, data):
        return nn.Parameter(data, requires_grad=weight.requires_grad)
    weight.data = data
    return weight


def copied(layer: AdapterLinear) -> None:
    """After a copy, whose tensors count their versions anew and which no thread has off."""
    layer._off = None
    record = layer._merge
    if record is not None and layer.weight is record.weight:
        layer._merge = record._replace(version=layer.weight._version)
