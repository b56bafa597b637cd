"""The base product over a given addend as a native call (csrc/include/qrlora/cpu/linear_add.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .low_rank import DTYPES, matrix, pointer, rows


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor, out: Tensor) -> None:
    """out = x Wᵀ + b + addend on x [M, K]; addend and out [M, N] are contiguous, or the same.

    fp32 and fp64, for few tokens; bf16 where there is AMX.
    """
    bias = None if bias is None else bias.contiguous()
    # The tensors are held until the kernel returns: they may be copies in a layout that it reads.
    held, operands = zip(matrix(rows(x)), matrix(weight), strict=True)
    native.core().linear_add(
        (*out.shape, x.shape[1], DTYPES[x.dtype], torch.get_num_threads()), *operands,
        pointer(bias), addend.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    del held
