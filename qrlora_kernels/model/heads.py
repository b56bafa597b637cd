"""What trains in full beside the adapter, such as a task head, is kept in fp32.

Over a half-precision model its numbers would hardly move at a small learning rate, and GradScaler
refuses fp16 gradients. The module computes in fp32: a hook lifts what comes in and another lowers
what goes out, so the rest of the model does not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..reference import HALF
from .memory import Adaptation
from .names import buffers, modules, parameters


class Lift:
    """Forward pre-hook: half-precision arguments in the dtype of the module's parameters."""

    def __init__(self) -> None:
        self.lifts = False  # whether this call's arguments were of the model's precision

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        found = {leaf.dtype for leaf in _floating((args, kwargs))}
        self.lifts = not found or bool(found & set(HALF))
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        return _map(lambda leaf: leaf.to(dtype) if leaf.dtype in HALF else leaf, (args, kwargs))


class Lower:
    """Forward hook: results in ``dtype``, which the rest of the model computes in."""

    def __init__(self, lift: Lift, dtype: torch.dtype) -> None:
        self.lift, self.dtype = lift, dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _map(lambda leaf: leaf.to(self.dtype), output) if self.lift.lifts else output


def _floating(tree: Any) -> Iterator[Tensor]:
    return (
        leaf
        for leaf in pytree.tree_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )


def _map(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    def one(leaf: Any) -> Any:
        return change(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(one, tree)


def keep_wide(
    model: nn.Module, names: Iterable[str], dtype: torch.dtype, memory: Adaptation
) -> None:
    """Keep the half-precision parameters ``names`` in ``dtype``, and buffers beside them.

    Parameters
    ----------
    model : nn.Module
    names : iterable of str
        Canonical names of parameters that train in full.
    dtype : torch.dtype
        What has it already is left alone.
    memory : Adaptation
        Takes the dtypes that were there before.
    """
    here: dict[str, Tensor] = {**buffers(model), **parameters(model)}
    chosen = {id(here[n]) for n in names if here[n].dtype in HALF and here[n].dtype != dtype}
    for module in _tops(model, chosen):
        widened = {id(t): t for t in _tensors(module, chosen) if t.dtype in HALF}
        before = {t.dtype for t in widened.values()}
        for name, tensor in here.items():
            if id(tensor) in widened:
                memory.dtypes.setdefault(name, tensor.dtype)
        for tensor in widened.values():
            tensor.data = tensor.data.to(dtype)
        _hook(module, min(before, key=str, default=dtype))


def _tensors(module: nn.Module, chosen: set[int]) -> list[Tensor]:
    """The chosen parameters in ``module``, and the buffers that lie beside them."""
    holders = [m for m in module.modules() if any(id(p) in chosen for p in _direct(m))]
    held = [p for m in holders for p in _direct(m) if id(p) in chosen]
    return [*held, *(b for m in holders for b in m._buffers.values() if b is not None)]


def _direct(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None]


def _tops(model: nn.Module, chosen: set[int]) -> list[nn.Module]:
    """The outermost modules all of whose parameters are chosen, and others that hold some."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in modules(model).values():
        if id(module) in inside:
            continue
        own = list(module.parameters())
        # Lists and dictionaries of modules are never called.
        whole = (
            bool(own)
            and all(id(p) in chosen for p in own)
            and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        )
        if whole or any(id(p) in chosen for p in _direct(module)):
            found.append(module)
            inside |= {id(m) for m in (module.modules() if whole else (module,))}
    return found


def _hook(module: nn.Module, lowered: torch.dtype) -> None:
    if any(isinstance(hook, Lift) for hook in module._forward_pre_hooks.values()):
        return
    lift = Lift()
    module.register_forward_pre_hook(lift, with_kwargs=True, prepend=True)
    module.register_forward_hook(Lower(lift, lowered))


def put_back(model: nn.Module, memory: Adaptation) -> None:
    """Take the hooks off and give every tensor the dtype it had."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(hook, (Lift, Lower))]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    here: dict[str, Tensor] = {**parameters(model), **buffers(model)}
    for name, dtype in memory.dtypes.items():
        if name in here:
            here[name].data = here[name].data.to(dtype)
    memory.dtypes.clear()
