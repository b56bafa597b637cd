"""A frozen matrix as the native product reads it: panels of a few columns (csrc/core/cpu/panels.h).

With AVX2 the fp32 sums of four tokens and more are MKL's, to the bit. bf16 is multiplied so where
the CPU has instructions for it; its sums are those of the matrix where it lies. Figures are in
bench/notes/cpu.md.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import native
from .native import DTYPES, pointers

# Tokens from which and to which the panels of AVX2 are ahead; WIDE: in fp64.
FEW, MANY, MOST, MOST_WIDE = 4, 256, 512, 16
LARGE, LARGER = 1 << 19, 1 << 20  # numbers of a weight
MANY_FOR_ONE = 1024
WORK = 1 << 25  # multiplications, below which asking for panels takes longer than they save
# With an adapter: to FEW_ADAPTED tokens, where one native call reads operands as they lie, it takes
# so much (with AVX-512 WORK_FEW); from there on that call brings them into panels every time.
FEW_ADAPTED, WORK_FEW = 32, 1 << 26
MADE, MADE_WIDE = 33, 512  # tokens from which that is ahead; WIDE: in fp64
WIDE = (torch.float32, torch.float64)


class Panels:
    """A matrix W [N, K] of fp32, fp64 or bf16 on the CPU, in panels.

    It is opaque: what it was made of has to be kept by somebody else.
    """

    def __init__(self, matrix: Tensor) -> None:
        n, k = matrix.shape
        number = DTYPES[matrix.dtype]
        self.rows, self.depth = n, k
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
        onto: Tensor | None = None,
    ) -> Tensor:
        """y [M, N] = x Wᵀ + b for x [M, K], all of the matrix's dtype.

        ``onto`` [M, N], contiguous, is added too, and holds y then.
        """
        (m, k), n = x.shape, self.rows
        # A kernel reads as many rows of its dtype as it is told.
        if k != self.depth or x.dtype != self.panels.dtype:
            raise ValueError(
                f"x must be [M, {self.depth}] of {self.panels.dtype} as the panels are, got "
                f"{list(x.shape)} of {x.dtype}"
            )
        y = x.new_empty(m, n) if onto is None else onto
        if y.shape != (m, n) or y.dtype != x.dtype:
            raise ValueError(
                f"onto must be [{m}, {n}] of {x.dtype}, got {list(y.shape)} of {y.dtype}"
            )
        held, tokens = pointers.rows(x)
        also_held, (bias_at,) = pointers.dense(bias)
        (result,) = pointers.out(y)
        native.core().times_panels(
            (m, n, k, DTYPES[x.dtype], torch.get_num_threads()),
            tokens, self.address, bias_at, 0 if onto is None else result, result,
        )  # fmt: skip
        del held, also_held
        return y


@functools.cache
def _instructions() -> str:
    """Those of the products here; "" where there are none, or have not been compared.

    MKL takes AVX-512 on Intel's processors, on AMD's AVX2.
    """
    name = native.instructions()
    return name if name == "avx2" or amd() else ""


@functools.cache
def amd() -> bool:
    """Whether this is a processor of AMD, on which most of this was measured."""
    return native.CORE is not None and bool(native.CORE.made_by_amd())


def used(dtype: torch.dtype) -> bool:
    """Whether the native product in ``dtype`` has measured faster than the library's here."""
    if dtype == torch.bfloat16:
        return _instructions() == "avx512_bf16"
    return dtype in WIDE and _instructions() in ("avx2", "avx512_bf16")


def pays(tokens: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether the product measured faster than ``F.linear`` for so many tokens."""
    if dtype == torch.bfloat16:
        return n * k >= LARGE and tokens > 0
    if dtype not in WIDE:
        return False
    if _instructions() != "avx2":
        return tokens >= FEW and (n * k >= LARGE or tokens * n * k >= WORK)
    most = MOST_WIDE if dtype == torch.float64 else MOST if n * k >= LARGER else MANY
    return n * k >= LARGE and FEW <= tokens <= most


def pays_adapted(tokens: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """The same of a layer with its adapter, where the update meets the base product."""
    if n * k < LARGE or dtype == torch.bfloat16:
        return n * k >= LARGE
    least = WORK if _instructions() == "avx2" else WORK_FEW
    return tokens > FEW_ADAPTED or tokens * n * k >= least


def made_pays(tokens: int, dtype: torch.dtype) -> bool:
    """Whether a native call that brings its operands into panels is ahead of library products."""
    if dtype not in WIDE or not (used(dtype) and amd()):
        return False
    return tokens >= (MADE_WIDE if dtype == torch.float64 else MADE)


def least_for_one() -> float:
    """From how many tokens of fp32 and fp64 on it is faster even where panels serve one product."""
    return MANY_FOR_ONE if _instructions() == "avx512_bf16" else math.inf
