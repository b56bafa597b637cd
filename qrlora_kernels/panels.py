"""A frozen matrix as the native product reads it: panels of a few columns (csrc/core/cpu/panels.h).

With AVX2 the fp32 sums of four tokens and more are MKL's, to the bit. bf16 is multiplied so where
the CPU has instructions for it; its sums are those of the matrix where it lies. Figures are in
bench/notes/cpu.md.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import native
from .native import DTYPES, pointers

FEW, MANY, MOST, MOST_WIDE = 4, 256, 512, 16  # tokens; the last in fp64
LARGE, LARGER = 1 << 19, 1 << 20  # numbers of a weight


class Panels:
    """A matrix W [N, K] of fp32, fp64 or bf16 on the CPU, in panels.

    It is opaque: what it was made of has to be kept by somebody else.
    """

    def __init__(self, matrix: Tensor) -> None:
        n, k = matrix.shape
        number = DTYPES[matrix.dtype]
        self.rows = n
        self.panels = matrix.new_empty(native.core().panel_elements(number, k, n))
        held, given = pointers.matrix(matrix.t())
        native.core().pack_panels(
            (0, n, k, number, torch.get_num_threads()), given, *pointers.out(self.panels)
        )
        del held
        (self.address,) = pointers.out(self.panels)

    @property
    def nbytes(self) -> int:
        """What the panels take in memory."""
        return self.panels.nbytes

    def product(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        beside: tuple[Tensor, Panels] | None = None,
    ) -> Tensor:
        """y [M, N] = x Wᵀ + mid Vᵀ + b for x [M, K] and ``beside`` = mid [M, r] and V [N, r].

        All are of the matrix's dtype.
        """
        mid, other = beside or (None, None)
        (m, k), n = x.shape, self.rows
        y = x.new_empty(m, n)
        held, tokens = pointers.rows(x)
        also_held, (mid_at, bias_at) = pointers.dense(mid, bias)
        (result,) = pointers.out(y)
        native.core().times_panels(
            (m, n, k, DTYPES[x.dtype], torch.get_num_threads()),
            tokens, self.address, 0 if mid is None else mid.shape[1],
            mid_at, 0 if other is None else other.address, bias_at, result,
        )  # fmt: skip
        del held, also_held
        return y


@functools.cache
def used(dtype: torch.dtype) -> bool:
    """Whether the native product in ``dtype`` has measured faster than the library's here."""
    core = native.CORE
    if core is None:
        return False
    column = core.columns[core.best_column()]
    if dtype == torch.bfloat16:  # the tile unit has its own
        return column == "avx512_bf16" and bool(core.amx_obstacle())
    return column == "avx2" and dtype in (torch.float32, torch.float64)


def most_tokens(n: int, k: int) -> int:
    """To how many tokens of fp32 panels are ahead."""
    return MOST if n * k >= LARGER else MANY


def pays(tokens: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether the product measured faster than ``F.linear`` for so many tokens."""
    if n * k < LARGE:
        return False
    if dtype == torch.bfloat16:
        return tokens > 0
    if tokens < FEW:
        return False
    if dtype == torch.float64:
        return tokens <= MOST_WIDE
    return dtype == torch.float32 and tokens <= most_tokens(n, k)
