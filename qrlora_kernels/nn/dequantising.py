"""The product of a layer over a quantised weight, by the dense weight [N, K] that it stands for.

That one is made in each forward, and again in the backward: between them autograd keeps what it is
made from. The product is the one of the adapted layer, whether its adapter is on, off or silent, in
training and in eval mode; what a library's own product rounds besides (activations in bitsandbytes'
int8 in eval mode, the sum before it is scaled in torchao's) is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import autocast_enabled, outside_autocast
from ..reference import accumulation_dtype
from . import base_weight

if TYPE_CHECKING:
    from ..adapters import AnyAdapter, State
    from .layer import AdapterLinear

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]  # of x, W and b


def forward(layer: AdapterLinear, x: Tensor) -> Tensor:
    """y [..., N] = x (W + ΔW)ᵀ + b of an adapted layer."""

    def product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        tensors = cast_operands(layer._tensors(), layer.adapter, x.dtype)
        y = layer._apart(x, matrix, bias, tensors)
        return (
            y if y is not None else layer.adapter.fused(x, matrix, bias, tensors, layer._strength)
        )

    return by_dense(layer, x, product)


def base(layer: AdapterLinear, x: Tensor) -> Tensor:
    """y [..., N] = x Wᵀ + b."""
    return by_dense(layer, x, F.linear)


def cast_operands(tensors: State, adapter: AnyAdapter, dtype: torch.dtype) -> State:
    """An adapter's tensors as a product in ``dtype`` takes them, whatever the start's dtype."""
    wide = (*adapter.trainables, *adapter.kept_fp32)
    return {
        name: tensor.to(accumulation_dtype(dtype) if name in wide else dtype)
        for name, tensor in tensors.items()
    }


def by_dense(layer: Any, x: Tensor, product: Product) -> Tensor:
    """``product`` with the dense weight of ``layer``, which autograd does not keep.

    In the dtype that the library's product has, and under autocast in autocast's.
    """
    weight = base_weight.quantised(layer)
    _check(x)  # before anything is cast to a dtype of its own
    own = weight.multiplies_in(x)
    dtype = _under_autocast(own, x.device)

    def make() -> Tensor:
        with torch.no_grad():
            return weight.recast(own, dtype)

    dense = make()
    bias = None if layer.bias is None else layer.bias.to(dtype)
    with outside_autocast(x.device.type), made_again(dense, make):
        y = product(x.to(dtype), dense, bias)
    return y.to(x.dtype) if weight.keeps_dtype else y


def _check(x: object) -> None:
    """As the fused product does."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in base_weight.SUPPORTED_DTYPES:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")


def _under_autocast(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == torch.float64 or not autocast_enabled(device.type):
        return dtype
    return torch.get_autocast_dtype(device.type)


def dtype_in(layer: nn.Module) -> torch.dtype:
    """What a call is expected to be computed in, by the weight alone: x may be in another."""
    weight = base_weight.quantised(layer)
    own: torch.dtype = getattr(layer, "compute_dtype", None) or weight.dtype
    return _under_autocast(own, weight.weight.device)


class _View(NamedTuple):
    """What autograd keeps in the place of a dense weight, or of a view of it."""

    size: torch.Size
    stride: tuple[int, ...]


@contextmanager
def made_again(dense: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, autograd keeps ``make`` where it would keep ``dense``, the whole of its memory.

    Other tensors are kept as the hooks around this would keep them. A compiler, and whoever allows
    no such hooks, as the transforms of ``torch.func``, decide for themselves.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        yield
        return
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    memory = dense.untyped_storage()._cdata

    def pack(tensor: Tensor) -> Any:
        if type(tensor) is Tensor and tensor.untyped_storage()._cdata == memory:
            return _View(tensor.size(), tensor.stride())
        return tensor if outer is None else outer[0](tensor)

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, _View):
            return make().as_strided(kept.size, kept.stride)
        tensor: Tensor = kept if outer is None else outer[1](kept)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
