"""A frozen weight in the layout that oneDNN multiplies, which calls would otherwise bring it into.

For CPUs with AVX-512 for which :mod:`.panels` has not been measured, by figures that others
measured on Zen 4, where the native product is ahead of it (bench/notes/cpu.md).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# oneDNN adds long sums up in one chain: of more columns it is off by twice what F.linear is.
CHUNK = 512
MANY, LARGE = 512, 1 << 20  # tokens and numbers of a weight, in fp32


class Packed:
    """A matrix [N, K] in oneDNN's layout, in one or several pieces along K.

    It is opaque: what it was made of has to be kept by somebody else.
    """

    def __init__(self, matrix: Tensor) -> None:
        n, k = matrix.shape
        pieces = -(-k // CHUNK) if matrix.dtype == torch.float32 else 1  # half rounds each piece
        width = -(-k // (16 * pieces)) * 16
        self.columns = [slice(at, min(at + width, k)) for at in range(0, k, width)]
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.pieces = [reorder(matrix[:, own].contiguous(), None) for own in self.columns]
        self.nbytes = n * k * matrix.element_size()

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [M, N] = x Wᵀ + b for x [M, K] of the matrix's dtype."""
        multiply = torch.ops.mkldnn._linear_pointwise
        if len(self.pieces) == 1:
            one: Tensor = multiply(x, self.pieces[0], bias, "none", [], "")
            return one
        y: Tensor | None = None
        for columns, piece in zip(self.columns, self.pieces, strict=True):
            part = x[:, columns].contiguous()
            if y is None:
                y = multiply(part, piece, bias, "none", [], "")
            else:
                y = multiply.binary(part, y, piece, None, "add")
        assert y is not None
        return y


@functools.cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this PyTorch packs weights of ``dtype`` here, and multiplies by them right.

    Its functions are semi-private: they are tried once.
    """
    x = torch.arange(-24.0, 24.0, device="cpu").view(3, 16).to(dtype)
    matrix = x.repeat(4, 2)[:, :16] / 16
    try:
        y = Packed(matrix).product(x, matrix[:, 0].contiguous())
    except (AttributeError, RuntimeError, TypeError):
        return False
    exact = x.double() @ matrix.double().T + matrix[:, 0].double()
    return bool((y.double() - exact).abs().max() <= 1e-2 * exact.abs().max())


def pays(tokens: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether the packed product measured faster than ``F.linear`` for so many tokens."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return dtype != torch.float32 or tokens >= MANY or n * k >= LARGE
