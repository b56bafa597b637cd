"""What an adapted layer writes into a state dict and what it takes from one.

The options that a state belongs to travel in the state dict's metadata, which ``torch.save`` keeps:
the same numbers at another strength would be another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import base_weight, merging
from . import quantised as few_bits
from .quantised import BESIDE

if TYPE_CHECKING:
    from .layer import AdapterLinear

KEY = "qrlora_kernels"  # in a module's part of the metadata


def save(layer: AdapterLinear, destination: Any, prefix: str, keep_vars: bool) -> None:
    """Complete what ``nn.Module`` saved: the factors, or only the base of a merged layer."""
    merged = layer.merged
    for name in layer.trainables if merged else ():
        del destination[prefix + name]
    for name in BESIDE if merged else ():
        destination.pop(prefix + name, None)
    for name in () if merged else layer.held_factors():
        tensor = getattr(layer, name)
        destination[prefix + name] = tensor if keep_vars else tensor.detach()
    metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
    if metadata is not None:
        metadata[KEY] = {"merged": merged, **_meaning(layer)}


def _meaning(layer: AdapterLinear) -> dict[str, Any]:
    """What decides, beside the tensors, what the layer computes."""
    options = layer.options.to_dict()
    named = {"alpha": options["alpha"]} if "alpha" in options else {}
    return {
        "adapter": layer.kind,
        "rank": layer.rank,
        **named,
        "scaling": layer.scaling,
        "strength": layer.options.strength,
        "product": options.get("product"),
        "factors": getattr(layer.options, "factors", None),
    }


@contextmanager
def loading(
    layer: AdapterLinear,
    state: Any,
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> Iterator[Any]:
    """Around ``nn.Module``'s loading; gives what that is to load, None of another layer's state.

    The layer is unmerged first, so that the weight is its base's again, and takes its factors. A
    quantised weight stays, and the state dict must have the same or none.
    """
    refusal = _refusal(layer, state, prefix, (metadata or {}).get(KEY))
    if refusal:
        errors.append(f"{prefix[:-1] or 'the layer'} {refusal}")
        yield None
        return
    merging.unmerge(layer)
    layer.derived.drop()  # now: what it holds of the sources forbids PyTorch to swap them
    if layer._quantised:
        bits = {prefix + key for key in (*base_weight.quantised(layer).in_state(), *BESIDE)}
        yield {key: tensor for key, tensor in state.items() if key not in bits}
        for key in bits.intersection(state).intersection(missing):
            missing.remove(key)
    else:
        yield state
    held = layer.held_factors()
    found = {n: state[prefix + n] for n in held if prefix + n in state}
    for name, tensor in found.items():
        if prefix + name in unexpected:
            unexpected.remove(prefix + name)
        _take(layer, name, tensor, (metadata or {}).get("assign_to_params_buffers", False))
    missing.extend(prefix + n for n in held if strict and n not in found)
    if prefix + "weight" in state and len(found) == len(held):
        # A whole state: the factors came from the weight that lies beside them, whether it was
        # taken or not (PyTorch loads nothing into a weight that is away).
        weight = layer.weight
        if not layer._quantised:
            weight = state[prefix + "weight"].to(weight.dtype)
        layer._start = base_weight.digest(layer, weight)


def _refusal(layer: AdapterLinear, state: Any, prefix: str, saved: Any) -> str:
    """Why the state cannot be this layer's; empty if it can."""
    if saved is not None and saved["merged"]:
        return (
            "is adapted, and the state dict is that of a merged layer, whose weight holds the "
            "update already: load it into the plain model"
        )
    own = _meaning(layer)
    for name, value in (saved or {}).items():
        if name in own and own[name] != value:
            return f"was made with {name} {own[name]!r}, and the state dict with {name} {value!r}"
    for name in layer.held_factors():
        tensor, have = state.get(prefix + name), getattr(layer, name)
        if tensor is not None and tensor.shape != have.shape:
            return (
                f"must get {name} of shape {tuple(have.shape)}, got {tuple(tensor.shape)} in the "
                "state dict"
            )
    return _refusal_of_bits(layer, state, prefix)


def _refusal_of_bits(layer: AdapterLinear, state: Any, prefix: str) -> str:
    """Why the state's weight cannot be the quantised one that is here, or was before a merge."""
    weight = few_bits.quantised(layer.base_weight, layer)
    if weight is None:
        return ""
    for key in weight.in_state():
        if prefix + key in state and not weight.is_in_state(state[prefix + key], key):
            return (
                f"must get the quantised weight that it has ({weight.kind}), got another {key} in "
                "the state dict: load the model anew with its library, then the adapter"
            )
    return ""


@torch.no_grad()
def _take(layer: AdapterLinear, name: str, tensor: Tensor, assign: bool) -> None:
    have: Tensor = getattr(layer, name)
    if assign or have.is_meta:
        setattr(layer, name, tensor.detach())
    else:
        have.copy_(tensor)
