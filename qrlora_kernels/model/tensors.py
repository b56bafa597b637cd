"""A model's tensors by name, also those that are kept elsewhere until a forward needs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..nn import offload
from ..nn.base_weight import spread
from .names import modules


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, key = name.rpartition(".")
    return modules(root)[module], key


def _held(owner: nn.Module, key: str) -> Tensor:
    tensor = owner._parameters.get(key, owner._buffers.get(key))
    assert tensor is not None
    return tensor


def value_of(root: nn.Module, name: str) -> Tensor:
    """The numbers of the parameter or buffer ``name``."""
    owner, key = _owner(root, name)
    tensor = _held(owner, key).detach()
    return offload.stored(owner, key) if offload.is_away(owner, key) else tensor


def values_of(root: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``named`` tensors of ``root``, those that are away from where they are kept."""
    return {n: value_of(root, n) if t.is_meta else t.detach() for n, t in named.items()}


@torch.no_grad()
def put(root: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` into the parameter or buffer ``name``, here or where it is kept."""
    owner, key = _owner(root, name)
    tensor = _held(owner, key)
    if offload.is_away(owner, key):
        offload.keep(owner, key, value.to(tensor.dtype, copy=True))
    else:
        tensor.copy_(spread(value, tensor))


def settle(root: nn.Module, names: Iterable[str]) -> None:
    """Bring the parameters ``names`` in for good: what trains must not be taken away."""
    for name in names:
        offload.settle(*_owner(root, name))
