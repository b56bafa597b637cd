"""The base product over a given addend as a native call (csrc/include/qrlora/cpu/linear_add.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..native import pointers
from .low_rank import DTYPES


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor, out: Tensor) -> None:
    """out = x Wᵀ + b + addend on x [M, K]; addend and out [M, N] may be the same.

    fp32 and fp64, for few tokens; bf16 where there is AMX.
    """
    held, (tokens, w, vectors) = zip(
        pointers.rows(x, "x"), pointers.matrix(weight, "weight"), pointers.dense(bias, addend),
        strict=True,
    )  # fmt: skip
    native.core().linear_add(
        (*out.shape, x.shape[1], DTYPES[x.dtype], torch.get_num_threads()),
        tokens, w, *vectors, *pointers.out(out),
    )  # fmt: skip
    del held
