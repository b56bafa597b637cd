"""A frozen matrix as oneDNN multiplies it on a CPU, as it lies or packed, with its own rounding.

PyTorch's functions for it are semi-private (``torch.ops.mkldnn``): whether they are there and right
is tried once a process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Unavailable

# oneDNN adds a long sum up in one chain, which in fp32 is off by twice what MKL's is above 1,024.
CHUNK = 512
_TRIED = 1e-2  # relative; what a wrong product misses by far, and bf16's rounding does not


class Matrix(Protocol):
    """W [N, K], to multiply by again and again."""

    def product(self, x: Tensor, onto: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """y [M, N] = x Wᵀ + b, or onto + x Wᵀ + b, for x [M, K] and onto [M, N]."""
        ...


Layout = Callable[[Tensor], Matrix]


class Library:
    """By what PyTorch's own linear calls, of any dtype."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def product(self, x: Tensor, onto: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if onto is None:
            return F.linear(x, self.matrix, bias)
        return torch.addmm(onto if bias is None else onto + bias, x, self.matrix.mT)


class OneDNN:
    """In contiguous pieces along K, each of which adds its product onto that of the one before."""

    def __init__(self, matrix: Tensor, packed: bool, tokens: int) -> None:
        reason = absence(matrix.dtype, packed)
        if reason:
            raise Unavailable(reason)
        k = matrix.shape[1]
        longest = CHUNK if matrix.dtype == torch.float32 else k  # each piece rounds to the dtype
        width = -(-k // -(-k // longest))
        self.columns = [slice(at, min(at + width, k)) for at in range(0, k, width)]
        self.pieces = [_piece(matrix[:, own], packed, tokens) for own in self.columns]

    def product(self, x: Tensor, onto: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        multiply, y = torch.ops.mkldnn._linear_pointwise, onto
        for columns, piece in zip(self.columns, self.pieces, strict=True):
            part = x[:, columns]
            if y is None:
                y = multiply(part, piece, bias, "none", [], "")
            else:
                y = multiply.binary(part, y, piece, bias, "add")
            bias = None
        assert y is not None
        return y


def _piece(columns: Tensor, packed: bool, tokens: int) -> Tensor:
    """A row stride that is not the width would send oneDNN to a loop a thousand times slower."""
    if packed:
        opaque: Tensor = torch.ops.mkldnn._reorder_linear_weight(columns.contiguous(), tokens)
        return opaque
    return columns if columns.mT.is_contiguous() else columns.contiguous()


@functools.cache
def absence(dtype: torch.dtype, packed: bool) -> str:
    """Why there is no such product of ``dtype`` here; "" if there is one, and it is right."""
    name = str(dtype).removeprefix("torch.")
    x = torch.arange(-24.0, 24.0).view(3, 16).to(dtype)
    matrix = x.repeat(4, 2)[:, :16].contiguous() / 16
    bias = matrix[:, 0].contiguous()
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(matrix, 3) if packed else matrix
        y = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        y = torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, bias, "add")
    except AttributeError:
        return f"torch {torch.__version__} has no oneDNN products to call"
    except RuntimeError:
        return f"oneDNN multiplies no {name} on this processor"
    exact = 2 * x.double() @ matrix.double().mT + bias.double()
    right = bool((y.double() - exact).abs().max() <= _TRIED * exact.abs().max())
    return "" if right else f"oneDNN's products of {name} are wrong on this processor"
