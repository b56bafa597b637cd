"""What trains in full beside the adapter, such as a task head, is kept in fp32.

Over a half-precision model its numbers would hardly move at a small learning rate, and GradScaler
refuses fp16 gradients. The module computes in fp32: a hook lifts what comes in and another lowers
what goes out, so the rest of the model does not notice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..nn import AdapterLinear
from ..reference import HALF
from .names import canonical, modules, parameters


class Kept:
    """Stands for ``module._apply``, through which every cast goes: what trains stays wide.

    Attributes
    ----------
    meant : dict
        The dtype that each of the kept tensors would have without it, by its name in the module.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype
        here = _tensors(module)
        self.meant = {name: here[name].dtype for name in names}

    def _set(self, dtypes: dict[str, torch.dtype]) -> None:
        here = _tensors(self.module)
        for name, dtype in dtypes.items():
            here[name].data = here[name].data.to(dtype)

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        here = {n: t for n, t in _tensors(self.module).items() if n in self.meant}
        held = {id(t): n for n, tensor in here.items() for t in (tensor, tensor.grad)}

        def convert(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            name = held.get(id(tensor))
            if name is None:
                return out
            # Asked of a tensor that has it: a move leaves a wide one as a cast to fp32 does.
            meant = fn(torch.empty(0, dtype=self.meant[name], device=tensor.device)).dtype
            self.meant[name] = meant
            if out.dtype not in HALF:
                return out
            if tensor.is_meta or out.is_meta:
                return torch.empty_like(out, dtype=self.dtype)
            return tensor.to(out.device, self.dtype)

        # That of the class, in whose place this object stands.
        module: nn.Module = type(self.module)._apply(self.module, convert, recurse)
        return module

    def lift(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook: half-precision arguments in the dtype of the module's parameters."""
        if self._model_dtype() is None:
            return None
        return _map(lambda t: t.to(self.dtype) if t.dtype in HALF else t, (args, kwargs))

    def lower(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: results in the dtype that the rest of the model computes in."""
        dtype = self._model_dtype()
        return None if dtype is None else _map(lambda t: t.to(dtype), output)

    def _model_dtype(self) -> torch.dtype | None:
        """The half precision of the model around; None where it has another."""
        return next((dtype for dtype in self.meant.values() if dtype in HALF), None)

    def put_on(self) -> None:
        self._set({n: self.dtype for n, meant in self.meant.items() if meant in HALF})
        vars(self.module)["_apply"] = self
        self.module.register_forward_pre_hook(self.lift, with_kwargs=True, prepend=True)
        self.module.register_forward_hook(self.lower)

    def take_off(self) -> None:
        module = self.module
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        del vars(module)["_apply"]
        self._set(self.meant)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_buffers()), **dict(module.named_parameters())}


def _floating(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in _tensors(module).items() if t.is_floating_point()}


def _map(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    def one(leaf: Any) -> Any:
        return change(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(one, tree)


def keep_wide(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """Keep the parameters ``names`` in ``dtype`` wherever the model is in half precision.

    That holds for casts that are still to come, too. Buffers beside them, such as running
    statistics, are kept as well.

    Parameters
    ----------
    model : nn.Module
    names : iterable of str
        Canonical names of parameters that train in full.
    dtype : torch.dtype
    """
    here = parameters(model)
    known = [kept for kept in map(_kept_by, model.modules()) if kept is not None]
    held = {id(t) for kept in known for n, t in _tensors(kept.module).items() if n in kept.meant}
    chosen = {id(here[n]) for n in names if here[n].is_floating_point()} - held
    # All are made before the first is put on: a tied weight is meant to be half in each of them.
    made = [Kept(module, _floating(module), dtype) for module in _whole(model, chosen)]
    for kept in made:
        chosen -= {id(t) for t in _floating(kept.module).values()}
        kept.put_on()
    for module in model.modules():
        if isinstance(module, AdapterLinear) and id(module.bias) in chosen:
            module.keep_bias(dtype)
            chosen -= {id(module.bias)}
    _tell_left([n for n in names if id(here[n]) in chosen and here[n].dtype in HALF], dtype)


def _kept_by(module: nn.Module) -> Kept | None:
    own = vars(module).get("_apply")
    return own if isinstance(own, Kept) else None


def _whole(model: nn.Module, chosen: set[int]) -> list[nn.Module]:
    """The outermost modules all of whose parameters are chosen."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in modules(model).values():
        own = list(module.parameters())
        # Lists and dictionaries of modules are never called.
        called = not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if id(module) not in inside and own and called and all(id(p) in chosen for p in own):
            found.append(module)
            inside |= {id(m) for m in module.modules()}
    return found


def _tell_left(names: list[str], dtype: torch.dtype) -> None:
    if names and dtype not in HALF:
        warnings.warn(
            f"{', '.join(names)} train in half precision, in which small steps are lost, because "
            "their modules do not train whole: name the modules in trainable=",
            stacklevel=4,
        )


def meant(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype that each tensor that is kept wide would have, by its canonical name."""
    return {
        canonical(f"{prefix}.{name}" if prefix else name): dtype
        for prefix, module in modules(model).items()
        if (kept := _kept_by(module)) is not None
        for name, dtype in kept.meant.items()
    }


def release(model: nn.Module) -> None:
    """Keep wide no longer what no longer trains."""
    for module in model.modules():
        kept = _kept_by(module)
        if kept is not None and not any(p.requires_grad for p in module.parameters()):
            kept.take_off()


def put_back(model: nn.Module) -> None:
    """Take the hooks off and give every tensor the dtype that it would have without them."""
    for module in model.modules():
        kept = _kept_by(module)
        if kept is not None:
            kept.take_off()
