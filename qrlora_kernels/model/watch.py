"""Whether adapted layers are part of the model's computation, seen at its first training step.

A parent that reads ``layer.weight`` and never calls the layer leaves its adapter without effect,
and no list of class names can find all such parents. So the first forward in training notes which
adapted layers it reached, and the first backward which of their tensors got a gradient.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..nn import AdapterLinear
from .names import modules


def watch(root: nn.Module) -> None:
    """Look at the next training step of ``root``, once."""
    if not any(isinstance(hook, Watch) for hook in root._forward_pre_hooks.values()):
        root.register_forward_pre_hook(Watch())


def stop(root: nn.Module) -> None:
    """Look no more."""
    for key in [k for k, hook in root._forward_pre_hooks.items() if isinstance(hook, Watch)]:
        del root._forward_pre_hooks[key]


class Watch:
    """Forward pre-hook on the model that was adapted; takes itself off at its first training."""

    def __call__(self, root: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not (root.training and torch.is_grad_enabled()):
            return
        stop(root)
        layers = {n: m for n, m in modules(root).items() if isinstance(m, AdapterLinear)}
        reached: set[int] = set()
        handles = [
            layer.register_forward_pre_hook(lambda module, _: reached.add(id(module)))
            for layer in set(layers.values())
        ]

        def conclude(module: nn.Module, args: Any, output: Any) -> None:
            for handle in handles:
                handle.remove()
            _tell_unreached([n for n, m in layers.items() if id(m) not in reached])
            _watch_gradients(root, {n: m for n, m in layers.items() if id(m) in reached}, output)

        handles.append(root.register_forward_hook(conclude))


def _tell_unreached(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"the first training forward did not call the adapted layers {', '.join(names)}: if "
            "something else reads their weight, their adapters have no effect",
            stacklevel=2,
        )


def _watch_gradients(root: nn.Module, layers: dict[str, AdapterLinear], output: Any) -> None:
    """After the first backward through ``output``, name the tensors that it left out."""
    asked = False

    def after() -> None:
        if all(p.grad is None for p in root.parameters()):
            return  # torch.autograd.grad, which leaves nothing in .grad
        dead = [
            f"{name}.{key}"
            for name, layer in layers.items()
            for key in layer.trainables
            if getattr(layer, key).requires_grad and getattr(layer, key).grad is None
        ]
        if dead:
            warnings.warn(
                f"the first backward gave no gradient to {', '.join(dead)}: they do not train",
                stacklevel=2,
            )

    def ask(_: Tensor) -> None:
        nonlocal asked
        if not asked:
            asked = True
            torch.autograd.Variable._execution_engine.queue_callback(after)

    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaf.register_hook(ask)
