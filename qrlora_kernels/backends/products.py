"""Products of PyTorch's library (oneDNN, MKL, cuBLAS) that the recipes are made of.

An update is computed first and the base product accumulates onto it in place: the sum meets the
fp32 accumulator of the product and is rounded once, so an update far below the resolution of a
half-precision ``y`` survives. The other order would round ``y`` before the update is added and lose
nearly all of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.problem import Problem
from ..halves import multiplies
from ..panels import Panels
from ..reference import HALF, accumulation_dtype

# How the base product and a bias meet an update; :func:`bases` says which apply, best first.
ADDMM, ONEDNN, FP32 = "addmm", "onednn", "fp32"


def bases(problem: Problem) -> tuple[str, ...]:
    """The ways in which x Wᵀ + b accumulates onto an update in one rounding, best first.

    PyTorch's own products on the CPU add a bias to a half-precision y that is rounded already.
    oneDNN's does not, where the CPU multiplies halves; else the sum is one of fp32, which from a
    few tokens on is faster than a plain loop over halves as well.
    """
    if problem.device.type != "cpu" or problem.dtype not in HALF:
        return (ADDMM,)
    if not multiplies("cpu", problem.dtype):
        return (FP32,) if problem.bias else (FP32, ADDMM)
    if not problem.bias:
        return (ADDMM,)
    return (ONEDNN, FP32) if problem.m and problem.k else (FP32,)


def onto(how: str, update: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``update`` [M, N] + x Wᵀ + b, in the update's place where the product allows it."""
    if bias is not None and how == ONEDNN:
        return _linear_bias_add(x, weight, bias, update)
    if how == FP32:
        y = torch.addmm(update.float(), x.float(), weight.float().mT)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    y = update.addmm_(x, weight.mT)
    # One pass more, and in half precision one rounding (on CUDA alone); the bias comes last and so
    # cannot drown the update.
    return y if bias is None else y.add_(bias)


def into_fp32(rows: Tensor, factor: Tensor) -> Tensor:
    """rows [M, K] factor [K, r] of fp16 in fp32: h or g, whose range fp16 may not have."""
    if rows.is_cuda:
        return torch.mm(rows, factor, out_dtype=torch.float32)
    return torch.mm(rows.float(), factor.float())


def out_of_fp32(mid: Tensor, factor: Tensor) -> Tensor:
    """mid [M, r] of fp32 times a factor [r, N] of fp16, in fp16: an update or its share of dx."""
    if mid.is_cuda:
        return torch.mm(mid.to(factor.dtype), factor)
    return torch.mm(mid, factor.float()).to(factor.dtype)


def through(
    how: str, mid: Tensor, up: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """``mid upᵀ + x Wᵀ + b``, the update ``mid upᵀ`` first."""
    if bias is not None and x.dtype not in HALF:
        return F.linear(mid, up, bias).addmm_(x, weight.mT)
    narrow = mid.dtype == up.dtype
    update = torch.mm(mid, up.mT) if narrow else out_of_fp32(mid, up.mT)
    return onto(how, update, x, weight, bias)


def by_panels(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] Aᵀ + b in fp32 and fp64 by panels of A [N, K] that serve this product alone."""
    return Panels(matrix).product(x, bias)


def _linear_bias_add(x: Tensor, weight: Tensor, bias: Tensor, addend: Tensor) -> Tensor:
    # oneDNN takes the bias as N elements from its address on, whatever its stride; x and the addend
    # it reorders itself. A weight with gaps it multiplies in a loop, one that overlaps not at all.
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
        x, addend, weight, bias.contiguous(), "add"
    )
    return y


def times(scaling: float, t: Tensor) -> Tensor:
    """s t, without an operation where s = 1: with few tokens each operation counts."""
    return t if scaling == 1 else scaling * t


def column_dots(h: Tensor, g: Tensor) -> Tensor:
    """Σ_m h ∘ g [r] with products and sum in fp32 (fp64 for fp64)."""
    return (h.to(accumulation_dtype(h.dtype)) * g).sum(0)


def gram(u: Tensor, v: Tensor) -> Tensor:
    """uᵀ v with fp32 accumulation and an fp32 result (fp64 for fp64)."""
    if u.is_cuda and u.dtype in HALF:
        return torch.mm(u.mT, v, out_dtype=torch.float32)
    wide = accumulation_dtype(u.dtype)
    return torch.mm(u.to(wide).mT, v.to(wide))
