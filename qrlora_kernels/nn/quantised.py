"""Frozen weights that another library keeps in few bits, and the layers over them.

The libraries are known by the names of their types and never imported.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .kinds import EightBit, FourBit, Quantised, TorchAO

# Layers with a forward of their own; those of torchao are nn.Linear over another weight.
LAYERS = ("Linear4bit", "Linear8bitLt")
_KINDS: dict[tuple[str, str], type[Quantised]] = {
    ("bitsandbytes", "Params4bit"): FourBit,
    ("bitsandbytes", "Int8Params"): EightBit,
    ("torchao", "TorchAOBaseTensor"): TorchAO,
}


def _kind(weight: Any) -> type[Quantised] | None:
    if type(weight) in (Tensor, nn.Parameter):  # and a compiler asks no further
        return None
    for one in type(weight).__mro__:
        found = _KINDS.get((one.__module__.partition(".")[0], one.__name__))
        if found is not None:
            return found
    return None


def is_quantised(weight: Any) -> bool:
    return _kind(weight) is not None


def quantised(weight: Any, layer: nn.Module | None = None) -> Quantised | None:
    """``weight`` as what it is, if it is quantised; ``layer``: the one that it is the weight of."""
    kind = _kind(weight)
    return None if kind is None else kind(weight, layer)


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of the matrix that ``weight`` is or stands for, as its layer stores it."""
    found = quantised(weight)
    return weight.shape if found is None else found.shape


def kind_of(weight: Tensor) -> str:
    """The dtype of ``weight`` as a file names it, or in which few bits it is."""
    found = quantised(weight)
    return str(weight.dtype).removeprefix("torch.") if found is None else found.kind


def nbytes(weight: Tensor) -> int:
    """What ``weight`` takes in memory."""
    found = quantised(weight)
    return weight.numel() * weight.element_size() if found is None else found.nbytes()


def held(weight: Tensor) -> Tensor:
    """``weight``, or of a quantised one the tensor that holds its codes."""
    found = quantised(weight)
    return weight if found is None else max(found.parts().values(), key=Tensor.numel)


def recovered(weight: nn.Parameter) -> nn.Parameter:
    """A parameter that was bitsandbytes' before it was pickled, which keeps what hangs on it."""
    kinds = sys.modules["bitsandbytes.nn"]
    kind = kinds.Params4bit if hasattr(weight, "quant_state") else kinds.Int8Params
    again: nn.Parameter = weight.data.as_subclass(kind)
    vars(again).update(vars(weight))
    return again


def make_plain(layer: nn.Module) -> None:
    """Let ``layer``, which holds a dense weight now, be an ``nn.Linear`` without what a library
    keeps for its few bits."""
    layer.__class__ = nn.Linear
    for name in _KEPT_BY_LAYERS:
        vars(layer).pop(name, None)
    if isinstance(layer.bias, Tensor) and isinstance(layer.weight, Tensor):
        bias = layer.bias.detach().to(layer.weight.dtype)
        layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)


BESIDE = ("SCB", "weight_format")  # what bitsandbytes' int8 layers save beside their weight
_KEPT_BY_LAYERS = (
    "compute_dtype", "compute_type_is_set", "quant_state", "quant_storage",
    "support_avx512bf16_for_cpu", "state", "index", "extra_repr",
)  # fmt: skip


def is_layer(kind: type) -> bool:
    """Whether ``kind`` is a layer's class whose forward is the product with its own weight."""
    return kind.__name__ in LAYERS and kind.__module__.partition(".")[0] == "bitsandbytes"
