"""Nested (jagged) tensors: rows of several lengths, which a linear layer sees as one matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_jagged(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_nested and x.layout == torch.jagged


def through(function: Callable[[Tensor], Tensor], x: Any) -> Tensor:
    """``function`` of the values of ``x`` [B, rows, ..., K], with the lengths that ``x`` has.

    Raises
    ------
    ValueError
        If the dimension of several lengths is not the second: it may be the features.
    """
    if x._ragged_idx != 1:
        raise ValueError(
            "a nested tensor must have its several lengths in dimension 1, got them in dimension "
            f"{x._ragged_idx}: transpose it back"
        )
    y: Tensor = torch.nested.nested_tensor_from_jagged(
        function(x.values()), x.offsets(), x.lengths()
    )
    return y
