"""A layer becomes its adapter and stays the object that it was: only its class changes.

Hooks, offloading, compile guards, optimizers, FSDP and the user's own names and attributes hang on
the object; they all stay.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..adapters import Options, State
from . import base_weight, offload

if TYPE_CHECKING:
    from .layer import AdapterLinear

Adapter = TypeVar("Adapter", bound="AdapterLinear")


_MADE: dict[tuple[type, type], type] = {}


def adapted_class(adapter: type[Adapter], base: type[nn.Module]) -> type[Adapter]:
    """The class of a layer that was of class ``base`` and is adapted by ``adapter``.

    It comes from both, so that ``isinstance`` holds for each, and is made once.
    """
    if (adapter, base) not in _MADE:
        _MADE[adapter, base] = _make(adapter, base)
    return _MADE[adapter, base]


def _make(adapter: type[AdapterLinear], base: type[nn.Module]) -> type:
    body: dict[str, Any] = {
        "over": base,
        "__module__": adapter.__module__,
        "__doc__": adapter.__doc__,
        **base_weight.features(base),
    }
    if "__slots__" in vars(base):
        body["__slots__"] = ()
    if base_weight.plain_base(base) is not nn.Linear:
        body["forward"] = _forward_of_x(adapter)
    name = adapter.__name__ if base is nn.Linear else f"{adapter.__name__}Over{base.__name__}"
    return types.new_class(name, (adapter, base), {}, lambda space: space.update(body))


def _forward_of_x(adapter: type[AdapterLinear]) -> Callable[..., torch.Tensor]:
    """As ``Conv1D`` is called: its argument has another name than that of ``nn.Linear``."""

    def forward(self: AdapterLinear, x: torch.Tensor) -> torch.Tensor:
        return adapter.forward(self, x)  # whatever class is put in front, as fully_shard does

    return forward


def become(
    layer: nn.Module, adapter: type[Adapter], options: Options, state: State, name: str = "linear"
) -> Adapter:
    """Turn ``layer`` into ``adapter`` with the tensors in ``state``; the same object.

    Raises
    ------
    TypeError, ValueError
        Before anything has changed, if the layer cannot be adapted; the message names it.
    """
    check_can_become(layer, adapter, name)
    layer.__class__ = adapted_class(adapter, type(layer))
    adapted: Adapter = layer  # type: ignore[assignment]
    try:
        adapted._take_up(options, state)
        offload.rebind(adapted)
        offload.narrow(adapted, adapter.trainables)
    except BaseException:  # an interruption too
        restore(adapted)
        raise
    return adapted


def check_can_become(layer: nn.Module, adapter: type[AdapterLinear], name: str = "linear") -> None:
    """Raise unless ``layer`` is a base that has none of the names that the adapter brings.

    A made class is there afterwards, so that nothing is left to fail once a layer has changed.
    """
    base_weight.check_base(layer, name)
    plain = base_weight.plain_base(type(layer))
    below = type(layer).__mro__[: type(layer).__mro__.index(plain)]
    taken = {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules}
    taken = taken.union(*(vars(one) for one in below))
    clash = sorted(taken & own_names(adapter))
    if clash:
        raise TypeError(
            f"{name} must not have names of its own that the adapter brings, got an "
            f"{base_weight.full_name(type(layer))} with {', '.join(clash)}"
        )
    try:
        adapted_class(adapter, type(layer))
    except TypeError as error:
        raise TypeError(
            f"{name} is an {base_weight.full_name(type(layer))}, of which no class of an adapted "
            f"layer can be made: {error}"
        ) from None


def own_names(adapter: type[AdapterLinear]) -> frozenset[str]:
    """The attributes of an adapted layer that its base does not have."""
    known = {*dir(adapter), *adapter.trainables, *adapter.factors, *adapter.state_names}
    return frozenset(known - {*dir(nn.Linear), "in_features", "out_features", "conv1d"})


def over(layer: nn.Module) -> type[nn.Module]:
    """The class that the adapted ``layer`` had before.

    Raises
    ------
    TypeError
        If another library has changed the class since, as ``fully_shard`` and parametrisations do.
    """
    before: type[nn.Module] | None = vars(type(layer)).get("over")
    if before is None:
        raise TypeError(
            "an adapted layer must have the class that adapt gave it, got "
            f"{base_weight.full_name(type(layer))}: something stands on top of it and has to be "
            "taken off first"
        )
    return before


def restore(layer: AdapterLinear) -> nn.Module:
    """Give the layer its class back and take the adapter's tensors off; the same object.

    Its weight stays what it is now: merged or not.
    """
    before = over(layer)
    differs = layer.bias is not None and layer.bias.dtype != layer.weight.dtype
    if differs and layer.bias is not None and not base_weight.takes_any_bias(before):
        # Another parameter: a copy of the layer may share this one.
        narrow = layer.bias.detach().to(layer.weight.dtype)
        layer.bias = nn.Parameter(narrow, requires_grad=layer.bias.requires_grad)
    for name in layer.trainables:
        layer._parameters.pop(name, None)
    offload.widen(layer)
    offload.forget(layer, layer.trainables)
    for name in (*layer.factors, *layer.state_names):
        vars(layer).pop(name, None)
    layer.__class__ = before  # type: ignore[assignment]
    offload.rebind(layer)
    return layer


def shallow_copy(layer: nn.Module) -> nn.Module:
    """Another layer over the same parameters, with its own registers of tensors and hooks."""
    other: nn.Module = type(layer).__new__(type(layer))
    vars(other).update(
        {k: v.copy() if isinstance(v, (dict, set)) else v for k, v in vars(layer).items()}
    )
    return other


def without_hooks_of_accelerate(layer: nn.Module) -> nn.Module:
    """``layer``, whose forward is its class's again: a copy must not run the original's."""
    for name in (offload.HOOK, "_old_forward", "forward"):
        vars(layer).pop(name, None)
    return layer


def blank(adapter: type[AdapterLinear], base: type[nn.Module]) -> AdapterLinear:
    """An empty object of a made class, which ``pickle`` and ``copy`` cannot find by its name."""
    made = adapted_class(adapter, base)
    empty: AdapterLinear = made.__new__(made)
    return empty
