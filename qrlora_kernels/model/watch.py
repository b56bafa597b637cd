"""Whether adapted layers are part of the model's computation, seen at its first training step.

A parent that reads ``layer.weight`` and never calls the layer leaves its adapter without effect,
and no list of class names can find all such parents. So the first forward in training notes which
adapted layers it reached, and the first backward which of their tensors got a gradient. What a
compiler runs is not looked at.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..nn import AdapterLinear
from .advice import followed
from .names import modules

# Hold modules and are never called themselves.
CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def watch(root: nn.Module) -> None:
    """Look at the next training step of ``root``, once, and at every state dict that it loads."""
    if tell_changed not in root._load_state_dict_post_hooks.values():
        root.register_load_state_dict_post_hook(tell_changed)
    if not any(isinstance(hook, Watch) for hook in root._forward_pre_hooks.values()):
        root.register_forward_pre_hook(Watch())


def stop(root: nn.Module) -> None:
    """Look no more."""
    for module in root.modules():
        _drop(module._forward_pre_hooks, (Watch, Arrival))
        _drop(module._forward_hooks, (Conclusion,))


def forget_loads(root: nn.Module) -> None:
    """Look at no further state dict."""
    hooks = root._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is tell_changed]:
        del hooks[key]


def tell_changed(root: nn.Module, _: Any) -> None:
    """Hook after ``load_state_dict``: names the layers whose factors are of other weights now."""
    layers = _adapted(modules(root)).items()
    changed = {name: layer.options for name, layer in layers if layer.base_changed()}
    if changed:
        warnings.warn(
            f"the state dict brought other weights for {', '.join(changed)} than their factors "
            "came from: call qk.refresh(model) to start again from these, before training"
            f"{followed(changed)}",
            stacklevel=3,
        )


def _drop(hooks: dict[int, Any], kinds: tuple[type, ...]) -> None:
    for key in [key for key, hook in hooks.items() if isinstance(hook, kinds)]:
        del hooks[key]


class Watch:
    """Forward pre-hook on the model that was adapted; takes itself off at its first training."""

    def __call__(self, root: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not (root.training and torch.is_grad_enabled()):
            return
        if getattr(root, "_is_replica", False):
            return  # one of DataParallel's for a single forward
        here, compiled = modules(root), _compiled(root)
        layers = _adapted(here)
        if any(layer._off is not None for layer in layers.values()):
            return
        stop(root)
        parents = {n: _caller(n, here) for n, layer in layers.items() if id(layer) not in compiled}
        arrived = {""}  # the root, which may be an adapted layer itself
        for name in {*parents, *parents.values()} - {""}:
            here[name].register_forward_pre_hook(Arrival(name, arrived))
        root.register_forward_hook(Conclusion(parents, arrived))


class Arrival:
    """Forward pre-hook on a module: notes that it was called."""

    def __init__(self, name: str, arrived: set[str]) -> None:
        self.name, self.arrived = name, arrived

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.arrived.add(self.name)


class Conclusion:
    """Forward hook on the model: says what was not reached, and looks at the backward.

    After a forward that an error ended, it concludes at the end of the next.
    """

    def __init__(self, parents: dict[str, str], arrived: set[str]) -> None:
        self.parents, self.arrived = parents, arrived

    def __call__(self, root: nn.Module, args: Any, output: Any) -> None:
        stop(root)
        missed = [name for name in self.parents if name not in self.arrived]
        called = [n for n in missed if self.parents[n] in self.arrived]
        _tell_unread(called)
        _tell_uncalled([name for name in missed if name not in called])
        layers = {n: m for n, m in _adapted(modules(root)).items() if n in self.arrived}
        _tell_moving([n for n, m in layers.items() if m.weight.requires_grad and _follows(m)])
        Backward(root, layers).follow(output)


def _adapted(here: dict[str, nn.Module]) -> dict[str, AdapterLinear]:
    """The adapted layers by the first of their names."""
    first = {id(m): (n, m) for n, m in reversed(here.items()) if isinstance(m, AdapterLinear)}
    return dict(reversed(first.values()))


def _caller(name: str, here: dict[str, nn.Module]) -> str:
    """The module around the layer ``name`` whose forward is to call it."""
    parent = name.rpartition(".")[0]
    while parent and isinstance(here[parent], CONTAINERS):
        parent = parent.rpartition(".")[0]
    return parent


def _compiled(root: nn.Module) -> set[int]:
    """What lies inside modules that were compiled apart."""
    tops = [m for m in root.modules() if m._compiled_call_impl is not None or _is_compiled(m)]
    return {id(inner) for top in tops for inner in top.modules()}


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def _tell_unread(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"the first training forward did not call the adapted layers {', '.join(names)}, "
            "though it called the modules that hold them: if these read the weight of the layer, "
            "its adapter has no effect",
            stacklevel=2,
        )


def _tell_uncalled(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"the first training forward did not call the adapted layers {', '.join(names)}, nor "
            "the modules that hold them: a layer that was dropped, an expert without tokens, or "
            "something that takes no part",
            stacklevel=2,
        )


def _follows(layer: AdapterLinear) -> bool:
    """Whether the layer's update is made of its weight as it is."""
    return bool(layer.options.form == "output")


def _tell_moving(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"the weights of {', '.join(names)} train, and with factors='output' the updates are "
            "made of them and change with them: with factors='both' they would not",
            stacklevel=2,
        )


class Backward:
    """The first backward through a model's output: which adapter tensors it leaves out."""

    def __init__(self, root: nn.Module, layers: dict[str, AdapterLinear]) -> None:
        self.layers = layers
        self.trained = [p for p in root.parameters() if p.requires_grad]
        self.begun = False
        self.given: set[int] = set()

    def follow(self, output: Any) -> None:
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._begin)

    def _begin(self, _: Tensor) -> None:
        if self.begun:
            return
        self.begun = True
        self.handles = [
            p.register_post_accumulate_grad_hook(lambda p: self.given.add(id(p)))
            for p in self.trained
        ]
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        for handle in self.handles:
            handle.remove()
        if not self.given:
            return  # torch.autograd.grad, which gives nothing to parameters
        dead = [name for name, p in self._tensors() if id(p) not in self.given and p.grad is None]
        if dead:
            warnings.warn(
                f"the first backward gave no gradient to {', '.join(dead)}: they do not train",
                stacklevel=2,
            )

    def _tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.layers.items():
            for key in layer.trainables:
                p = getattr(layer, key)
                if p.requires_grad:
                    yield f"{name}.{key}", p
