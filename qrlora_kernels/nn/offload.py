"""Layers whose weights accelerate brings in for each forward and takes away after it.

accelerate hangs a hook on the layer and puts a forward of its own in front: ``_old_forward`` is the
bound method of the class that the layer had then, and an offloading hook walks all parameters of
the layer and looks each up in its map of weights. Both have to follow when the layer becomes
another class with parameters of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

HOOK = "_hf_hook"


def hooked(layer: nn.Module) -> bool:
    """Whether a hook of accelerate hangs on ``layer``."""
    return HOOK in vars(layer)


def is_away(layer: nn.Module) -> bool:
    """Whether the weight is on the meta device until a forward brings it in."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.is_meta and bool(_offloading(layer))


def _hooks(layer: nn.Module) -> list[Any]:
    """The hooks on the layer, those of a sequence one by one."""
    hook = vars(layer).get(HOOK)
    return list(getattr(hook, "hooks", (hook,))) if hook is not None else []


def _offloading(layer: nn.Module) -> list[Any]:
    return [hook for hook in _hooks(layer) if getattr(hook, "offload", False)]


def rebind(layer: nn.Module) -> None:
    """Point the forward behind the hooks, or that a removed hook left, at the layer's class."""
    for name in ("_old_forward", "forward"):
        own = vars(layer).get(name)
        if isinstance(own, MethodType) and own.__self__ is layer:
            vars(layer)[name] = MethodType(type(layer).forward, layer)


# --- hooks that see the base's tensors alone


class BaseOnly:
    """In front of an offloading hook's class: the adapter's own tensors stay out of its sight.

    It would look them up in a map that does not know them, or send what trains to the meta device.
    """

    adapter_names: frozenset[str]

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self._base_alone(module):
            return super().pre_forward(module, *args, **kwargs)  # type: ignore[misc]

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        with self._base_alone(module):
            return super().post_forward(module, output)  # type: ignore[misc]

    def detach_hook(self, module: nn.Module) -> Any:
        with self._base_alone(module):
            return super().detach_hook(module)  # type: ignore[misc]

    @contextmanager
    def _base_alone(self, module: nn.Module) -> Iterator[None]:
        parameters = module._parameters
        aside = {n: parameters.pop(n) for n in list(parameters) if n in self.adapter_names}
        try:
            yield
        finally:
            parameters.update(aside)


_NARROWED: dict[type, type] = {}


def _narrowed_class(kind: type) -> type:
    if kind not in _NARROWED:
        _NARROWED[kind] = type(f"BaseOnly{kind.__name__}", (BaseOnly, kind), {})
    return _NARROWED[kind]


def narrow(layer: nn.Module, names: Sequence[str]) -> None:
    """Keep the layer's parameters ``names`` from its offloading hooks."""
    _replace_hooks(layer, lambda hook: _narrowed(hook, names))


def widen(layer: nn.Module) -> None:
    """Undo :func:`narrow`."""
    _replace_hooks(layer, lambda hook: getattr(hook, "_whole", hook))


def check_narrow(layer: nn.Module) -> None:
    """Raise if an offloading hook would take away what trains, after which it trains no more."""
    if any(not isinstance(hook, BaseOnly) for hook in _offloading(layer)):
        raise RuntimeError(
            "an offloading hook was hung on this layer after it was adapted and takes what trains "
            "away after every forward: dispatch the model first and call qk.adapt after it"
        )


def _narrowed(hook: Any, names: Sequence[str]) -> Any:
    if isinstance(hook, BaseOnly) or not getattr(hook, "offload", False):
        return hook
    narrowed = copy.copy(hook)
    narrowed.__class__ = _narrowed_class(type(hook))
    narrowed.adapter_names, narrowed._whole = frozenset(names), hook
    return narrowed


def _replace_hooks(layer: nn.Module, change: Any) -> None:
    hook = vars(layer).get(HOOK)
    if hook is None:
        return
    if hasattr(hook, "hooks"):
        hook.hooks = tuple(change(one) for one in hook.hooks)
    else:
        vars(layer)[HOOK] = change(hook)


# --- bringing weights in


@contextmanager
def brought_in(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the layers' own parameters hold the data that their hooks keep for them."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_one_brought_in(layer))
        yield


@contextmanager
def _one_brought_in(layer: nn.Module) -> Iterator[None]:
    if not is_away(layer):
        yield
        return
    (hook, *_) = _offloading(layer)
    away = {name: p for name, p in layer._parameters.items() if p is not None and p.is_meta}
    try:
        for name, parameter in away.items():
            data = _stored(hook, name).to(_device(hook))
            layer._parameters[name] = nn.Parameter(data, parameter.requires_grad)
        yield
    finally:
        layer._parameters.update(away)


def stored(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """What the module's offloading hook keeps of its ``tensor``; itself if there is no hook."""
    return next((_stored(hook, name) for hook in _offloading(module)), tensor)


def _stored(hook: Any, name: str) -> Tensor:
    value: Tensor = hook.weights_map[name]
    return value


def _device(hook: Any) -> torch.device:
    device = hook.execution_device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def keep(layer: nn.Module, name: str, value: Tensor) -> None:
    """Where the layer's tensors are kept elsewhere, keep ``value`` there and leave it on meta."""
    for hook in _offloading(layer):
        store, key = hook.weights_map, name
        while hasattr(store, "dataset"):  # accelerate's view of a map under a prefix
            store, key = store.dataset, f"{store.prefix}{key}"
        # A loader of files looks into its tensors in memory first.
        memory = getattr(store, "state_dict", store)
        if not callable(memory):
            memory[key] = value.detach().cpu()
        if name in layer._parameters:
            layer._parameters[name] = nn.Parameter(value.detach().to("meta"), requires_grad=False)
