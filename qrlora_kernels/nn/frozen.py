"""What may be adapted: a plain ``nn.Linear`` or GPT-2's ``Conv1D`` with an ordinary weight."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's ``Conv1D``: a linear layer that stores its weight as [K, N].

    Known by its name and attributes, so that transformers need not be imported.
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def is_linear_like(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def check_base(linear: nn.Module, name: str = "linear") -> None:
    """Raise unless ``linear`` is a layer whose forward and weight an adapter can take over."""
    if not is_linear_like(linear):
        raise TypeError(
            f"{name} must be an nn.Linear or a transformers Conv1D, got {type(linear).__name__}"
        )
    if hasattr(linear, "parametrizations"):
        raise TypeError(f"{name} must have a plain weight, got a parametrised one")
    own_forward = isinstance(linear, nn.Linear) and type(linear).forward is not nn.Linear.forward
    if own_forward or "forward" in vars(linear):
        raise TypeError(
            f"{name} must compute a plain linear product, got {type(linear).__name__} with a "
            "forward of its own (a quantised layer, an adapter, or a wrapper)"
        )
    check_weight(linear.weight, f"{name}.weight")


def check_weight(weight: object, name: str) -> None:
    """Raise unless ``weight`` is a dense floating-point matrix with data."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if not isinstance(weight, nn.Parameter):
        raise TypeError(
            f"{name} must be a parameter, got a plain tensor (weight_norm, spectral_norm and "
            "pruning recompute it before every forward)"
        )
    if type(weight.data) is not Tensor:
        raise TypeError(
            f"{name} must be an ordinary tensor, got {type(weight.data).__name__} (quantised and "
            "distributed weights are not supported)"
        )
    if weight.is_meta:
        raise ValueError(f"{name} must hold data, got a tensor on the meta device")
    if weight.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {weight.dtype} (quantised "
            "weights are not supported)"
        )
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{name} must be a matrix with elements, got shape {list(weight.shape)}")


def frozen_matrix(linear: nn.Module) -> Tensor:
    """The weight as W [N, K]: for Conv1D a transposed view, never a copy."""
    weight = cast(Tensor, linear.weight).detach()
    return weight.t() if is_conv1d(linear) else weight
