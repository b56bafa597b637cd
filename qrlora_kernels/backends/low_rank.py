"""QR-LoRA and LoRA-XS as one native call a step; ``cpu`` and ``amx`` say which problems go there.

Both adapters are y = x Wᵀ + s (x downᵀ) G upᵀ + b: a diagonal gate G = diag(λ) for QR-LoRA, a core
G = C for LoRA-XS (csrc/include/qrlora/cpu/low_rank.h). With few tokens the calls themselves take
the time, so each step makes one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..native import pointers
from ..reference import accumulation_dtype

# Element types as csrc/include/qrlora/dtype.h numbers them.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def qr_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    r: Tensor,
    lam: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b + s (h ∘ λ) Qᵀ on x [M, K]; returns y [M, N] and h = x R̃ᵀ [M, r]."""
    return _forward(x, weight, bias, r, q, lam, scaling)


def qr_linear_bwd(
    dy: Tensor,
    weight: Tensor,
    q: Tensor,
    r: Tensor,
    lam: Tensor,
    h: Tensor,
    scaling: float,
    need_dx: bool = True,
    need_dlam: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """g = dy Q;  dλ = s Σ_m h ∘ g;  dx = dy W + s (g ∘ λ) R̃."""
    return _backward(dy, weight, r, q, lam, h, scaling, need_dx, need_dlam)


def lora_xs_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    core: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b + s (h C) Bᵀ on x [M, K]; returns y [M, N] and h = x Aᵀ [M, r]."""
    return _forward(x, weight, bias, a, b, core, scaling)


def lora_xs_linear_bwd(
    dy: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    core: Tensor,
    h: Tensor,
    scaling: float,
    need_dx: bool = True,
    need_dcore: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """g = dy B;  dC = s hᵀ g;  dx = dy W + s (g Cᵀ) A."""
    return _backward(dy, weight, a, b, core, h, scaling, need_dx, need_dcore)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    gate: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    m, r = x.shape[0], gate.shape[-1]
    held, (tokens, *frozen, (gate_at, bias_at)) = _read(x, weight, down, up, gate, bias)
    # On the device of x: the default device may be another.
    y, h = x.new_empty(m, weight.shape[0]), x.new_empty(m, r)
    native.core().low_rank_forward(
        (m, *weight.shape, r, DTYPES[x.dtype], torch.get_num_threads()), tokens, *frozen,
        (gate_at, DTYPES[gate.dtype], gate.dim() == 2, scaling),
        bias_at, *pointers.out(y, h),
    )  # fmt: skip
    del held
    return y, h


def _backward(
    dy: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    gate: Tensor,
    h: Tensor,
    scaling: float,
    need_dx: bool,
    need_dgate: bool,
) -> tuple[Tensor | None, Tensor | None]:
    if not (need_dx or need_dgate):
        return None, None
    m, dtype = dy.shape[0], dy.dtype
    held, (rows_of_dy, *frozen, (gate_at, h_at)) = _read(dy, weight, down, up, gate, h)
    dx = dy.new_empty(m, weight.shape[1]) if need_dx else None
    dgate = dy.new_empty(gate.shape, dtype=accumulation_dtype(dtype)) if need_dgate else None
    native.core().low_rank_backward(
        (m, *weight.shape, gate.shape[-1], DTYPES[dtype], torch.get_num_threads()),
        rows_of_dy, *frozen, (gate_at, DTYPES[gate.dtype], gate.dim() == 2, scaling),
        h_at, *pointers.out(dx, dgate),
    )  # fmt: skip
    del held
    return dx, None if dgate is None else dgate.to(gate.dtype)


def _read(
    tokens: Tensor, weight: Tensor, down: Tensor, up: Tensor, *dense: Tensor | None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The tensors to hold until the kernel returns, and what it is given of them."""
    held, given = zip(
        pointers.rows(tokens),
        pointers.matrix(weight, "weight"),
        pointers.matrix(down),
        pointers.matrix(up),
        pointers.dense(*dense),
        strict=True,
    )
    return held, given
