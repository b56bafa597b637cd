"""Frozen weights kept in the dtype that this processor multiplies, so that no call casts them.

Under autocast a frozen weight is cast again at every call: PyTorch's cache keeps only leaves that
ask for a gradient. And a CPU that multiplies no halves takes a plain loop over a bf16 weight; its
fp32 products of a kept copy are faster and round once, at the end.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import autocast_enabled, outside_autocast
from ..halves import multiplies
from ..reference import HALF
from . import base_weight, layouts, offload
from .become import shallow_copy, without_hooks_of_accelerate
from .derived import Derived

if TYPE_CHECKING:
    from .layer import AdapterLinear


class Kept(NamedTuple):
    """Operands of a call in the dtype of the product, and the dtype that its result has."""

    x: Tensor
    matrix: Tensor
    bias: Tensor | None
    tensors: dict[str, Tensor]
    dtype: torch.dtype


def dtypes(weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What a call's operands are rounded to, and what the product is taken in."""
    dtype, device = weight.dtype, weight.device.type
    if dtype != torch.float64 and autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return dtype, torch.float32 if dtype in HALF and not multiplies(device, dtype) else dtype


def operands(layer: nn.Module, x: Tensor, layout: bool = False) -> Kept | None:
    """Those of the frozen product x Wᵀ + b; None where the call has nothing to gain or is odd.

    ``layout``: whether another layout of the weight would be a gain.

    That is a weight which is cast nowhere, asks for a gradient, is computed anew, gathered or away,
    and a call that something other than PyTorch's kernels sees.
    """
    weight = layer._parameters.get("weight")
    if torch.compiler.is_compiling() or weight is None or not isinstance(x, Tensor):
        return None
    dtype, wide = dtypes(weight)
    if weight.dtype == dtype == wide and not layout:
        return None
    if offload.offloads(layer) or base_weight.is_gathered(layer):
        return None
    if not (x.is_floating_point() and _agrees(x, weight)):
        return None  # it has its own answer, or error
    bias: Tensor | None = layer._parameters.get("bias")
    # One that trains is brought to the weight's dtype.
    brought = vars(layer).get("_bias_dtype") is not None
    if bias is not None and not (brought or _agrees(bias, weight)):
        return None  # likewise
    kept = weight if weight.dtype == dtype == wide else keep(layer, "weight", weight)
    if kept is None:
        return None
    if bias is not None:
        bias = _as(bias, dtype, wide)  # of few numbers, and it may train
    matrix = kept.t() if base_weight.is_conv1d(layer) else kept
    return Kept(_as(x, dtype, wide), matrix, bias, {}, dtype)


def _as(tensor: Tensor, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
    """``tensor`` rounded to ``dtype``, as ``wide``; without an operation where it is both."""
    return tensor if tensor.dtype == dtype == wide else tensor.to(dtype).to(wide)


def _agrees(operand: Tensor, weight: Tensor) -> bool:
    """Whether a call without kept weights takes an operand of this dtype beside the weight."""
    if operand.dtype == weight.dtype:
        return True
    wide = torch.float64 in (operand.dtype, weight.dtype)  # which autocast leaves as it is
    return autocast_enabled(weight.device.type) and not wide


def keep(layer: nn.Module, name: str, tensor: Tensor) -> Tensor | None:
    """``tensor`` as the product takes it, kept by the layer; None where a call goes without it."""
    dtype, wide = dtypes(cast(Tensor, layer.weight))
    if tensor.dtype == dtype == wide:
        return tensor
    derived = cast(Derived, layer.derived)
    return derived.get(f"{name} in {dtype} as {wide}", _cast(dtype, wide), tensor)


@functools.cache
def _cast(dtype: torch.dtype, wide: torch.dtype) -> Any:
    return lambda tensor: _as(tensor, dtype, wide)


def forward(layer: AdapterLinear, x: Tensor) -> Tensor | None:
    """The adapted layer's y by what it keeps; None where there is nothing to gain."""
    if torch.compiler.is_compiling():  # before the chooser is asked, which is not to be traced
        return None
    packed = layer._packed is not None and layouts.may_pay(layer, x, dtypes(layer.weight))
    found = operands(layer, x, layout=packed)
    if found is None:
        return None
    found = found._replace(tensors=layer._tensors())
    x, matrix, bias, tensors, dtype = found
    adapter, wide = layer.adapter, x.dtype
    for name in tensors.keys() - {*adapter.trainables, *adapter.kept_fp32}:
        if tensors[name].dtype == dtype == wide:
            continue
        fits = _agrees(tensors[name], layer.weight)
        factor = keep(layer, name, tensors[name]) if fits else None
        if factor is None:
            return None
        tensors[name] = factor
    with outside_autocast(x.device.type):
        y = layer._apart(x, matrix, bias, tensors)
        if y is None and packed:
            y = layouts.adapted(layer, found)
        if y is None:
            y = adapter.fused(x, matrix, bias, tensors, layer._strength)
        return y if y.dtype == dtype else y.to(dtype)


def base(layer: nn.Module, x: Tensor) -> Tensor | None:
    """y [..., N] = x Wᵀ + b by what the layer keeps; None where there is nothing to gain."""
    packed = vars(layer).get("packed")
    found = operands(layer, x, layout=packed is not None)
    if found is None:
        return None
    with outside_autocast(x.device.type):
        y = None if packed is None else layouts.product(layer, packed, found)
        if y is None:
            y = F.linear(found.x, found.matrix, found.bias)
        return y if y.dtype == found.dtype else y.to(found.dtype)


class PrepackedLinear(nn.Module):
    """A frozen linear layer in front of whose class this stands: the same object, and its answer.

    ``over`` is the class it had; ``packed``, in which directions it keeps a kernel's layout too.
    """

    over: ClassVar[type[nn.Module]]
    derived: Derived
    packed: layouts.Directions | None

    def forward(self, input: Tensor) -> Tensor:
        """y [..., N] = x Wᵀ + b for x [..., K]."""
        y = base(self, input) if type(input) is Tensor else None
        if y is None:
            y = cast(Tensor, self.over.forward(self, input))
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.derived.drop()  # before there are two of everything
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.derived.drop()  # now: what it holds of the weight forbids PyTorch to swap it
        super()._load_from_state_dict(*args)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in the layer's place: a plain one."""
        check_on_top(self)
        plain = without_hooks_of_accelerate(shallow_copy(self))
        take_off(cast(PrepackedLinear, plain))
        return plain

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the class it was made of: a made class cannot be found by its name."""
        reduced = super().__reduce_ex__(max(protocol, 2))
        if "over" not in vars(type(self)):  # a class on top of ours knows how to be found
            return reduced
        return _blank, (self.over,), reduced[2]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.derived = Derived()  # a shallow copy has the original's


_MADE: dict[type, type] = {}


def _class_over(before: type) -> Any:
    if before not in _MADE:
        body = {"over": before, "__module__": __name__, "__doc__": PrepackedLinear.__doc__}
        if base_weight.plain_base(before) is not nn.Linear:
            body["forward"] = _forward_of_x
        _MADE[before] = type(f"Prepacked{before.__name__}", (PrepackedLinear, before), body)
    return _MADE[before]


def _forward_of_x(self: PrepackedLinear, x: Tensor) -> Tensor:
    """As ``Conv1D`` is called: its argument has another name than that of ``nn.Linear``."""
    return PrepackedLinear.forward(self, x)


def _blank(before: type[nn.Module]) -> nn.Module:
    made = _class_over(before)
    empty: nn.Module = made.__new__(made)
    return empty


def take_up(linear: nn.Module, packed: layouts.Directions | None = None) -> None:
    """Let a plain linear layer, which :func:`can_keep` has passed, keep what calls would cast."""
    made = _class_over(type(linear))
    linear.__class__ = made
    vars(linear)["derived"] = Derived()
    vars(linear)["packed"] = packed
    offload.rebind(linear)


def take_off(linear: PrepackedLinear) -> None:
    """Give the layer, which :func:`check_on_top` has passed, its class back."""
    vars(linear).pop("derived", None)
    vars(linear).pop("packed", None)
    linear.__class__ = linear.over  # type: ignore[assignment]
    offload.rebind(linear)


def check_on_top(linear: PrepackedLinear, name: str = "a prepacked layer") -> None:
    """Raise where the layer's class is no more the one that :func:`take_up` gave it."""
    if "over" not in vars(type(linear)):
        raise TypeError(
            f"{name} must have the class that prepack gave it, got "
            f"{base_weight.full_name(type(linear))}: something stands on top of it, such as a "
            "parametrisation, and has to be taken off first"
        )


def can_keep(module: nn.Module) -> bool:
    """Whether ``module`` is a plain linear layer over a dense weight that does not train."""
    try:
        base_weight.check_base(module)
    except (TypeError, ValueError):
        return False
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.requires_grad or offload.is_away(module) or base_weight.is_quantised(module):
        return False
    # A layer of another library may have names of its own that would be hidden.
    return not any(hasattr(module, name) for name in ("derived", "over", "packed"))
