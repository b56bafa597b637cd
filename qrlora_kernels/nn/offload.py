"""Layers whose weights accelerate brings in for each forward and takes away after it.

accelerate hangs a hook on the layer and puts a forward of its own in front: ``_old_forward`` is the
bound method of the class that the layer had then, and an offloading hook walks all parameters of
the layer and looks each up in its map of weights. Both have to follow when the layer becomes
another class with parameters of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

HOOK = "_hf_hook"


def hooked(layer: nn.Module) -> bool:
    """Whether a hook of accelerate hangs on ``layer``."""
    return HOOK in vars(layer)


def is_away(layer: nn.Module, name: str = "weight") -> bool:
    """Whether the tensor ``name`` is on the meta device until a forward brings it in."""
    tensor = getattr(layer, name, None)
    return isinstance(tensor, Tensor) and tensor.is_meta and bool(_offloading(layer))


def _hooks(layer: nn.Module) -> list[Any]:
    """The hooks on the layer, those of a sequence one by one."""
    hook = vars(layer).get(HOOK)
    return list(getattr(hook, "hooks", (hook,))) if hook is not None else []


def offloads(layer: nn.Module) -> bool:
    """Whether the layer's weights come in for each forward alone, as other tensors each time."""
    return HOOK in layer.__dict__ and bool(_offloading(layer))


def _offloading(layer: nn.Module) -> list[Any]:
    return [hook for hook in _hooks(layer) if getattr(hook, "offload", False)]


def rebind(layer: nn.Module) -> None:
    """Point the forward behind the hooks, or that a removed hook left, at the layer's class."""
    for name in ("_old_forward", "forward"):
        own = vars(layer).get(name)
        if isinstance(own, MethodType) and own.__self__ is layer:
            vars(layer)[name] = MethodType(type(layer).forward, layer)


# --- hooks that see what is frozen alone


class FrozenOnly:
    """In front of an offloading hook's class: what trains stays out of its sight.

    It would look an adapter's tensors up in a map that does not know them, and send what trains to
    the meta device.
    """

    trained_names: frozenset[str]
    original_devices: dict[str, Any]

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self._frozen_alone(module):
            return super().pre_forward(module, *args, **kwargs)  # type: ignore[misc]

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        with self._frozen_alone(module):
            return super().post_forward(module, output)  # type: ignore[misc]

    def detach_hook(self, module: nn.Module) -> Any:
        with self._frozen_alone(module):
            return super().detach_hook(module)  # type: ignore[misc]

    @contextmanager
    def _frozen_alone(self, module: nn.Module) -> Iterator[None]:
        parameters = module._parameters
        aside = {n: parameters.pop(n) for n in list(parameters) if n in self.trained_names}
        try:
            yield
        finally:
            parameters.update(aside)


_NARROWED: dict[type, type] = {}


def _narrowed_class(kind: type) -> type:
    if kind not in _NARROWED:
        _NARROWED[kind] = type(f"FrozenOnly{kind.__name__}", (FrozenOnly, kind), {})
    return _NARROWED[kind]


def narrow(layer: nn.Module, names: Iterable[str]) -> None:
    """Keep the layer's parameters ``names`` from its offloading hooks."""
    _replace_hooks(layer, lambda hook: _narrowed(hook, frozenset(names)))


def widen(layer: nn.Module) -> None:
    """Undo :func:`narrow` and :func:`settle`: what stayed goes where the hooks keep the rest."""
    stayed = {n for hook in _hooks(layer) for n in getattr(hook, "trained_names", ())}
    _replace_hooks(layer, lambda hook: getattr(hook, "_whole", hook))
    for name, parameter in [*layer._parameters.items()]:
        if name in stayed and parameter is not None:
            keep(layer, name, parameter)


def forget(layer: nn.Module, names: Iterable[str]) -> None:
    """Let no hook put the parameters ``names`` back, which the layer has no more."""
    for hook in _offloading(layer):
        for name in names:
            hook.original_devices.pop(name, None)


def settle(layer: nn.Module, name: str) -> None:
    """Bring the parameter ``name`` in for good, because it is to train."""
    if not is_away(layer, name):
        return
    parameter = layer._parameters[name]
    assert parameter is not None
    stays = nn.Parameter(stored(layer, name).clone(), parameter.requires_grad)
    narrow(layer, [name])
    layer._parameters[name] = stays


def check_narrow(layer: nn.Module) -> None:
    """Raise if an offloading hook would take away what trains, after which it trains no more."""
    if any(not isinstance(hook, FrozenOnly) for hook in _offloading(layer)):
        raise RuntimeError(
            "an offloading hook was hung on this layer after it was adapted and takes what trains "
            "away after every forward: dispatch the model first and call qk.adapt after it"
        )


def _narrowed(hook: Any, names: frozenset[str]) -> Any:
    if not getattr(hook, "offload", False):
        return hook
    narrowed = copy.copy(hook)
    if not isinstance(hook, FrozenOnly):
        narrowed.__class__ = _narrowed_class(type(hook))
        narrowed.trained_names, narrowed._whole = frozenset(), hook
    narrowed.trained_names |= names
    # What it puts back when it is taken off.
    devices = narrowed.original_devices
    narrowed.original_devices = {n: d for n, d in devices.items() if n not in names}
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
    away = {n: p for n, p in layer._parameters.items() if p is not None and is_away(layer, n)}
    try:
        for name, parameter in away.items():
            layer._parameters[name] = nn.Parameter(stored(layer, name), parameter.requires_grad)
        yield
    finally:
        layer._parameters.update(away)


def kept(layer: nn.Module, name: str) -> Tensor:
    """The layer's tensor ``name``, which is away, in the memory that it is kept in."""
    (hook, *_) = _offloading(layer)
    value: Tensor = hook.weights_map[name]
    return value.detach()


def stored(layer: nn.Module, name: str) -> Tensor:
    """The same on the device that the layer computes on."""
    (hook, *_) = _offloading(layer)
    return kept(layer, name).to(_device(hook))


def _device(hook: Any) -> torch.device | None:
    device = hook.execution_device
    return torch.device("cuda", device) if isinstance(device, int) else device


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
        away = value.detach().to("meta")
        if name in layer._buffers:
            layer._buffers[name] = away
        else:
            layer._parameters[name] = nn.Parameter(away, requires_grad=False)
