"""Checks shared by the factorisations: which tensors they take, and how errors name them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..native import pointers

MATRIX_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Several matrices as a caller gives them, and by the names that errors have for them.
Weights = Sequence[Tensor] | Mapping[str, Tensor]
Named = dict[str, Tensor]


def named_matrices(weights: Tensor | Weights) -> Named:
    """Checked matrices by their names: a mapping's own, or weights and weights[i].

    Raises
    ------
    TypeError
        Not a tensor, or a sequence or mapping of tensors, or not a dense tensor of a floating dtype
        that has its elements in memory.
    ValueError
        Not 2-D, empty, or on the meta device. The message names the matrix.
    """
    if isinstance(weights, Tensor):
        named = {"weights": weights}
    elif isinstance(weights, Mapping):
        named = dict(weights)
    elif isinstance(weights, Sequence) and not isinstance(weights, (str, bytes)):
        named = {f"weights[{i}]": item for i, item in enumerate(weights)}
    else:
        raise TypeError(f"weights must be a tensor or a list of them, got {type(weights).__name__}")
    for name, item in named.items():
        _check_matrix(name, item)
    return {name: pointers.checked(item.detach(), name) for name, item in named.items()}


def check_choice(argument: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(allowed)}, got {value!r}")


def check_out_dtype(out_dtype: torch.dtype | None) -> None:
    if out_dtype is not None and out_dtype not in MATRIX_DTYPES:
        raise TypeError(f"out_dtype must be one of {_names(MATRIX_DTYPES)}, got {out_dtype}")


def check_rank_fits(name: str, rank: int, weight: Tensor) -> None:
    limit = min(weight.shape)
    if rank > limit:
        raise ValueError(
            f"rank must be at most min(N, K) = {limit} for {name} of shape "
            f"{tuple(weight.shape)}, got {rank}"
        )


def check_finite(name: str, weight: Tensor) -> float:
    """The largest magnitude in ``weight`` [N, K]; ValueError if it holds NaN or Inf."""
    largest = largest_magnitude(weight)
    if not math.isfinite(largest):
        raise ValueError(f"{name} must be finite, got NaN or Inf")
    return largest


def largest_magnitude(tensor: Tensor) -> float:
    """The largest magnitude in a tensor with elements; NaN where it holds one."""
    # Read as it lies in memory: across it takes ten times as long.
    along = tensor.mT if tensor.ndim == 2 and tensor.stride(0) < tensor.stride(1) else tensor
    low, high = (float(end) for end in torch.aminmax(along.detach()))
    return max(abs(low), abs(high))


def _check_matrix(name: str, weight: object) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(weight).__name__}")
    if weight.is_nested or weight.is_quantized or weight.layout is not torch.strided:
        kind = "nested" if weight.is_nested else f"{weight.dtype}, {weight.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    if weight.dtype not in MATRIX_DTYPES:
        raise TypeError(f"{name} must have a dtype of {_names(MATRIX_DTYPES)}, got {weight.dtype}")
    if weight.device.type == "meta":
        raise ValueError(f"{name} must hold data, got a tensor on the meta device")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"{name} must be a non-empty matrix [N, K], got {tuple(weight.shape)}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
