"""The mathematics of the three adapters in plain PyTorch, forward and explicit backward.

Every fast path is tested against this file, and it is the fallback where none applies. Operands are
the records of ``operands``, which says their shapes; half-precision operands are computed in fp32
and rounded once, at the output.

For each operation, ``*_ref`` is the forward as autograd would differentiate it (any leading
dimensions); ``*_fwd_ref`` and ``*_bwd_ref`` work on ``[M, K]`` and show exactly what is saved and
how the gradients follow from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .operands import Kron, KronGradient, LinearAdd, LowRank, LowRankGradient, is_core
from .segments import products_by_adapter, sum_by_adapter

HALF = (torch.float16, torch.bfloat16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else (contract 1 of the design)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hidden_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of h, and of g in backward: the operands', but fp32 for fp16.

    |h| may reach √N times what y reaches, which need not fit fp16's range where y does.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def _wide(like: Tensor, *tensors: Tensor) -> Any:
    """The tensors in the accumulation dtype of ``like``."""
    dtype = accumulation_dtype(like.dtype)
    return [t.to(dtype) for t in tensors]


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + b in the accumulation dtype."""
    x, weight = _wide(x, x, weight)
    y = x @ weight.mT
    return y if bias is None else y + bias.to(y.dtype)


# --- A given update: y = x Wᵀ + b + addend


def linear_add_ref(p: LinearAdd) -> Tensor:
    """y [..., N] = x Wᵀ + b + addend, rounded once."""
    y = _base(p.x, p.weight, p.bias)
    return (y + p.addend.to(y.dtype)).to(p.x.dtype)


# --- Low rank. QR-LoRA (arXiv 2508.21810, eq. 3): up = Q_r, down = R_r Pᵀ, gate = λ.
#     LoRA-XS (arXiv 2405.17604, eq. 2): up = U_r, down = Σ_r V_rᵀ, gate = C, used as h C.


def low_rank_delta_ref(up: Tensor, down: Tensor, gate: Tensor, scaling: float = 1.0) -> Tensor:
    """ΔW [N, K] = s · up diag(λ) down, or s · up Cᵀ down."""
    up, down, gate = _wide(up, up, down, gate)
    if gate.dim() == 1:
        return scaling * (up * gate) @ down
    return scaling * up @ gate.mT @ down


def low_rank_ref(p: LowRank) -> Tensor:
    """y [..., N] = x Wᵀ + b + s · gate(h) upᵀ; ``index`` has the leading dimensions of x."""
    return _low_rank(p)[0].to(p.x.dtype)


def low_rank_fwd_ref(p: LowRank) -> tuple[Tensor, Tensor]:
    """Forward on x [M, K]; returns y [M, N] and what backward needs: h [M, r]."""
    y, h = _low_rank(p)
    return y.to(p.x.dtype), h.to(hidden_dtype(p.x.dtype))


def _low_rank(p: LowRank) -> tuple[Tensor, Tensor]:
    r = p.gate.shape[-1]
    x, up, gate = _wide(p.x, p.x, p.up[:, :r], p.gate)
    y = _base(p.x, p.weight, p.bias if p.down is not None else None)
    h = y @ up if p.down is None else x @ p.down[:r].to(x.dtype).mT
    y = y + p.scaling * _through_gate(h, gate, p.index) @ up.mT
    return y if p.down is not None or p.bias is None else y + p.bias.to(y.dtype), h


def low_rank_bwd_ref(p: LowRankGradient) -> tuple[Tensor | None, Tensor | None]:
    """g = dy up;  dλ = s Σ_m h ∘ g or dC = s hᵀ g, over each gate's own rows;
    dx = dy W + s gateᵀ(g) down, or (dy + s gateᵀ(g) upᵀ) W."""
    r = p.gate.shape[-1]
    dy, weight, up, gate, h = _wide(p.dy, p.dy, p.weight, p.up[:, :r], p.gate, p.h)
    g = dy @ up
    dx = dgate = None
    if p.need_dx:
        back = p.scaling * _through_gate(g, gate.mT if is_core(p) else gate, p.index)
        if p.down is None:
            dx = (dy + back @ up.mT) @ weight
        else:
            dx = dy @ weight + back @ p.down[:r].to(dy.dtype)
        dx = dx.to(p.dy.dtype)
    if p.need_dgate:
        dgate = _gate_gradient(p, h, g).to(p.gate.dtype)
    return dx, dgate


def _through_gate(h: Tensor, gate: Tensor, index: Tensor | None) -> Tensor:
    """h ∘ λ or h C, with each row's own gate where there is an index."""
    if index is None:
        return h * gate if gate.dim() == 1 else h @ gate
    if gate.dim() == 2:
        return h * gate[index]
    return torch.einsum("...i,...ij->...j", h, gate[index])


def _gate_gradient(p: LowRankGradient, h: Tensor, g: Tensor) -> Tensor:
    if p.index is None:
        return p.scaling * h.mT @ g if is_core(p) else p.scaling * (h * g).sum(0)
    if is_core(p):
        return p.scaling * products_by_adapter(h, g, p.index, p.gate.shape[0])
    return p.scaling * sum_by_adapter(h * g, p.index, p.gate.shape[0])


# --- OHoRA: ΔW = s · (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ), applied as vec(BᵀZAᵀ) (EMNLP 2025, eq. 6)


def kron_delta_ref(
    a: Tensor,
    b: Tensor,
    a0: Tensor | None = None,
    b0: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """ΔW [N, K] materialised (R-Kron) from a [N/r, r], b [K/r, r]."""
    a, b = _wide(a, a, b)
    delta = _kron(a, b.mT)
    if a0 is not None and b0 is not None:
        a0, b0 = _wide(a0, a0, b0)
        delta = delta - _kron(a0, b0.mT)
    return scaling * delta


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """``torch.kron`` for any strides; its own view fails on a row of a transposed matrix."""
    product = a[:, None, :, None] * b[None, :, None, :]
    return product.reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def _kron_apply(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(A ⊗ Bᵀ) x per token without the product: X = x as [r, K/r], Y = A (X B) as [N/r, r]."""
    tokens = x.reshape(*x.shape[:-1], a.shape[1], b.shape[0])
    return (a @ (tokens @ b)).reshape(*x.shape[:-1], a.shape[0] * b.shape[1])


def kron_ref(p: Kron) -> Tensor:
    """y [..., N] = x Wᵀ + b + s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x. Backward needs x alone."""
    x, a, b = _wide(p.x, p.x, p.a, p.b)
    update = _kron_apply(x, a, b)
    if p.a0 is not None and p.b0 is not None:
        update = update - _kron_apply(x, *_wide(p.x, p.a0, p.b0))
    return (_base(p.x, p.weight, p.bias) + p.scaling * update).to(p.x.dtype)


def kron_bwd_ref(p: KronGradient) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Per token S = X B, T = Aᵀ dY;  dA = s Σ dY Sᵀ;  dB = s Σ Xᵀ T;  dX = s (T Bᵀ − T₀ B₀ᵀ)."""
    dy, x, weight, a, b = _wide(p.dy, p.dy, p.x, p.weight, p.a, p.b)
    (n, r), k = a.shape, b.shape[0]
    m = x.shape[0]
    grads, tokens = dy.reshape(m, n, r), x.reshape(m, r, k)
    t = a.mT @ grads
    da = db = dx = None
    if p.need_da:
        da = (p.scaling * torch.einsum("mnj,mij->ni", grads, tokens @ b)).to(p.a.dtype)
    if p.need_db:
        db = (p.scaling * torch.einsum("mik,mij->kj", tokens, t)).to(p.b.dtype)
    if p.need_dx:
        update = t @ b.mT
        if p.a0 is not None and p.b0 is not None:
            a0, b0 = _wide(p.dy, p.a0, p.b0)
            update = update - (a0.mT @ grads) @ b0.mT
        dx = (dy @ weight + p.scaling * update.reshape(x.shape)).to(p.dy.dtype)
    return dx, da, db
