"""Merging the update into the weight, and what a layer knows of the weight it began with.

A merged layer is a plain linear one, in what it computes and in what its state dict holds, until
its weight is assigned, its state is loaded or it is unmerged. What is written into the merged
weight, and what stands in for it in one call of ``torch.func.functional_call``, is used as it is:
an update on top of that would count twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..fingerprint import quick_digest
from . import base_weight, offload, switch
from .rounding import round_unbiased

if TYPE_CHECKING:
    from .layer import AdapterLinear


class Merge(NamedTuple):
    """What ``merge`` put in and what it replaced."""

    weight: nn.Parameter
    original: nn.Parameter


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
    switch.check_on([layer], "merge")
    refuse_spread(layer)
    original = layer.weight
    if offload.is_away(layer):  # in the memory that it is kept in, not where it is computed with
        original = nn.Parameter(offload.kept(layer, "weight"), requires_grad=False)
    merged = merged_parameter(layer)
    base_weight.replace_weight(layer, merged)
    layer._merge = Merge(merged, original)
    layer.derived.drop()


def unmerge(layer: AdapterLinear) -> None:
    record = layer._merge
    if record is not None:
        base_weight.replace_weight(layer, record.original)
        assigned(layer, record.original)  # which a parametrised layer does not notice


def assigned(layer: AdapterLinear, weight: nn.Parameter | None) -> None:
    """After an assignment of ``weight``, which is the layer's base from now on.

    Unless it is the merged one, which a parametrisation or a pruning puts back.
    """
    if layer._merge is not None and weight is layer._merge.weight:
        return
    layer._merge = None
    layer.derived.drop()


def original(layer: AdapterLinear) -> nn.Parameter:
    """The weight before the merge, where the layer's weight is."""
    if layer._merge is None:
        return layer.weight
    weight, device = layer._merge.original, layer.weight.device
    if device.type == "meta" or weight.device == device:
        return weight
    return nn.Parameter(weight.to(device), requires_grad=False)


@torch.no_grad()
def merged_parameter(layer: AdapterLinear) -> nn.Parameter:
    """A parameter of its own with W + ΔW, whole: of a sharded layer every rank must call."""
    require_stored_weight(layer)
    with base_weight.present(layer):
        weight = base_weight.whole(layer.weight.detach())
        data = weight.clone() if layer.merged else _merged_weight(layer, weight)
    return nn.Parameter(data, requires_grad=False)


def require_stored_weight(layer: AdapterLinear) -> None:
    """Raise where what is put in the weight's place would be computed over, or not be taken."""
    if "weight" not in layer._parameters:
        raise ValueError(
            "weight must be a parameter to be merged, but a parametrisation, weight_norm or "
            "pruning computes it anew at every forward: take that off first, for example with "
            "torch.nn.utils.prune.remove"
        )


def refuse_spread(layer: AdapterLinear) -> None:
    """Raise where ``fully_shard`` would put its own weight back in place of the merged one."""
    if base_weight.is_gathered(layer) or hasattr(layer.weight, "full_tensor"):
        raise ValueError(
            "weight must lie whole in this process to be merged, and fully_shard spreads it over "
            "the ranks: write the merged model with qk.to_merged, or merge before fully_shard"
        )


def _merged_weight(layer: AdapterLinear, stored: Tensor) -> Tensor:
    if layer._strength == 0.0:
        return stored.clone()
    delta = layer.delta_weight()
    weight = stored.to(delta.dtype) + (delta.t() if layer.conv1d else delta)
    merged = round_unbiased(weight, stored.dtype).contiguous()
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
    if layer._merge is not None:
        return quick_digest(layer._merge.original) != layer._start
    with base_weight.present(layer):
        return base_weight.digest(layer) != layer._start
