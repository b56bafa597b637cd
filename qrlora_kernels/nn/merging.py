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

from . import base_weight, offload, switch
from .rounding import round_unbiased

if TYPE_CHECKING:
    from .adapted import Adapted
    from .layer import AdapterLinear


class Merge(NamedTuple):
    """What ``merge`` put in and what it replaced."""

    weight: nn.Parameter
    original: nn.Parameter
    dequantised: bool = False


def forward(layer: AdapterLinear, x: Tensor) -> Tensor:
    """A merged layer's: the product with its weight."""
    if layer.training and torch.is_grad_enabled():
        raise RuntimeError(
            "a merged layer cannot train: its update is inside the weight; call unmerge()"
        )
    return layer.base_forward(x)


@torch.no_grad()
def merge(layer: AdapterLinear, dequantize: bool | torch.dtype = False) -> None:
    if layer.merged:
        return
    switch.check_on([layer], "merge")
    refuse_spread(layer)
    original = layer.weight
    if offload.is_away(layer):  # in the memory that it is kept in, not where it is computed with
        original = nn.Parameter(offload.kept(layer, "weight"), requires_grad=False)
    merged = merged_parameter(layer, dequantize)
    was_quantised = layer._quantised
    base_weight.replace_weight(layer, merged)
    layer._merge = Merge(merged, original, was_quantised)
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
    layer._quantised = base_weight.is_quantised(layer)
    if layer._merge is not None and weight is layer._merge.weight:
        return
    layer._merge = None
    layer.derived.drop()


def original(layer: Adapted) -> nn.Parameter:
    """The weight before the merge, where the layer's weight is."""
    if layer._merge is None:
        return layer.weight
    weight, device = layer._merge.original, layer.weight.device
    if device.type == "meta" or weight.device == device:
        return weight
    return nn.Parameter(weight.to(device), requires_grad=False)


@torch.no_grad()
def merged_parameter(layer: AdapterLinear, dequantize: bool | torch.dtype = False) -> nn.Parameter:
    """A parameter of its own with W + ΔW, dense and whole: of a sharded layer all ranks call."""
    require_stored_weight(layer)
    require_dense(layer, dequantize)
    with base_weight.present(layer):
        weight = base_weight.whole(layer.weight.detach())
        data = weight.clone() if layer.merged else _merged_weight(layer, weight, dequantize)
    return nn.Parameter(data, requires_grad=False)


def require_stored_weight(layer: AdapterLinear) -> None:
    """Raise where what is put in the weight's place would be computed over, or not be taken."""
    if "weight" not in layer._parameters:
        raise ValueError(
            "weight must be a parameter to be merged, but a parametrisation, weight_norm or "
            "pruning computes it anew at every forward: take that off first, for example with "
            "torch.nn.utils.prune.remove"
        )


def check_dequantize(dequantize: bool | torch.dtype) -> None:
    if not isinstance(dequantize, bool) and dequantize not in base_weight.SUPPORTED_DTYPES:
        raise TypeError(
            "dequantize must be True, False, torch.float16, bfloat16, float32 or float64, got "
            f"{dequantize!r}"
        )


def require_dense(layer: AdapterLinear, dequantize: bool | torch.dtype) -> None:
    """Raise where the update would go into a quantised weight, which is too coarse for it."""
    check_dequantize(dequantize)
    if layer._quantised and not dequantize:
        raise ValueError(
            "weight must be dense to be merged, got one of the kind "
            f"{base_weight.quantised(layer).kind}, whose steps are larger than the update: merge "
            "with dequantize=True, which leaves a dense layer, or keep the adapter apart"
        )


def refuse_spread(layer: AdapterLinear) -> None:
    """Raise where ``fully_shard`` would put its own weight back in place of the merged one."""
    if base_weight.is_gathered(layer) or hasattr(layer.weight, "full_tensor"):
        raise ValueError(
            "weight must lie whole in this process to be merged, and fully_shard spreads it over "
            "the ranks: write the merged model with qk.to_merged, or merge before fully_shard"
        )


def _merged_weight(layer: AdapterLinear, stored: Tensor, dequantize: bool | torch.dtype) -> Tensor:
    weight, dtype = stored, stored.dtype
    if layer._quantised:
        weight = layer.matrix()
        dtype = dequantize if isinstance(dequantize, torch.dtype) else weight.dtype
    if layer._strength == 0.0:
        return weight.to(dtype, copy=True)
    delta = layer.delta_weight()
    wide = weight.to(delta.dtype) + (delta.t() if layer.conv1d else delta)
    merged = round_unbiased(wide, dtype).contiguous()
    if not bool(torch.isfinite(merged).all()):
        bad = int((~torch.isfinite(merged)).sum())
        raise ValueError(
            f"W + ΔW must be finite in {merged.dtype} to be merged, got {bad} elements of "
            f"{merged.numel()} that are not"
        )
    return merged


def recover(layer: AdapterLinear) -> None:
    """After a pickle: let what was a quantised weight be one."""
    if layer._quantised:
        layer._parameters["weight"] = base_weight.recovered(layer.weight)
    elif layer._merge is not None and layer._merge.dequantised:
        original = base_weight.recovered(layer._merge.original)
        layer._merge = layer._merge._replace(original=original)


# --- the weight that the factors came from


def base_changed(layer: Adapted) -> bool:
    """Whether the base weight has other bits than when the factors were made or loaded."""
    if layer._start is None:
        return False
    if layer._merge is not None:
        return base_weight.digest(layer, layer._merge.original) != layer._start
    with base_weight.present(layer):
        return base_weight.digest(layer) != layer._start
