"""Casts and moves of an adapted layer's tensors: what stays in fp32, and what it knows of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..reference import HALF
from . import base_weight, merging

if TYPE_CHECKING:
    from .layer import AdapterLinear

Change = Callable[[Tensor], Tensor]


def keeping_fp32(layer: AdapterLinear, fn: Change) -> Change:
    """``fn``, after which what is kept in fp32 is in fp32 where it asks for half.

    A bias that trains is then in the dtype that was asked for it.
    """
    own = [getattr(layer, name) for name in (*layer.trainables, *layer.adapter.kept_fp32)]
    kept = {id(t): torch.float32 for tensor in own for t in (tensor, tensor.grad)}
    if layer.bias is not None and layer._bias_dtype is not None:
        kept |= {id(t): layer._bias_dtype for t in (layer.bias, layer.bias.grad)}

    def change(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        if id(tensor) not in kept or out.dtype not in HALF:
            return out
        dtype = kept[id(tensor)]
        if tensor.is_meta or out.is_meta:
            return torch.empty_like(tensor, device=out.device, dtype=dtype)
        return tensor.to(out.device, dtype)

    return change


def follow_weight(layer: AdapterLinear) -> None:
    """Move the frozen tensors to where the weight is.

    ``fully_shard`` and accelerate's ``dispatch_model`` move parameters and buffers, and them alone.
    """
    for name in layer.held_factors():
        vars(layer)[name] = vars(layer)[name].to(layer.weight.device)


@contextmanager
def account_kept(layer: AdapterLinear, fn: Change) -> Iterator[None]:
    """Around a cast or a move of all the layer's tensors: its account of the weight stays true."""
    dtype, changed = layer.weight.dtype, None
    target = fn(torch.empty(0, dtype=dtype, device=layer.weight.device)).dtype
    if target != dtype:
        # Asked while the bits are the ones that were digested.
        changed = merging.base_changed(layer)
    yield
    if layer._merge is not None:
        # A parametrisation may have taken the weight away for a while.
        weight = layer._parameters.get("weight", layer._merge.weight)
        assert weight is not None
        layer._merge = layer._merge._replace(
            weight=weight, original=_converted(layer._merge.original, fn)
        )
    if changed is False and not layer.base_weight.is_meta:
        _begin_in(layer, dtype, target)


def _begin_in(layer: AdapterLinear, before: torch.dtype, now: torch.dtype) -> None:
    """Let the factors be those of the cast weight, unless it is back in a dtype that it had.

    There it has either the bits that it had, or others, which a narrower dtype has rounded.
    """
    if layer._start != layer._starts.get(before):
        layer._starts = {before: layer._start}  # loaded or refreshed since
    now_stored = base_weight.digest(layer, layer.base_weight)
    layer._start = layer._starts.setdefault(now, now_stored)


def _converted(weight: nn.Parameter, fn: Change) -> nn.Parameter:
    """``fn`` of a parameter outside the module, in place where it can be: it may be tied."""
    data = fn(weight.data)
    if not torch._has_compatible_shallow_copy_type(weight.data, data):
        return nn.Parameter(data, requires_grad=weight.requires_grad)
    weight.data = data
    return weight
