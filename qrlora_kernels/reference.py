"""The mathematics of the three adapters in plain PyTorch, forward and explicit backward.

Every fast path is tested against this file, and it is the fallback where none applies. Notation:
``x [M, K]`` tokens, ``W [N, K]`` the frozen weight, ``s`` the scaling. Half-precision operands are
computed in fp32 and rounded once, at the output.

For each adapter there are three functions: ``*_ref`` is the forward as autograd would
differentiate it (any leading dimensions), ``*_fwd_ref`` and ``*_bwd_ref`` work on ``[M, K]`` and
show exactly what is saved and how the gradients follow from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "kron_delta_ref",
    "kron_linear_bwd_ref",
    "kron_linear_fwd_ref",
    "kron_linear_ref",
    "linear_add_ref",
    "lora_xs_delta_ref",
    "lora_xs_linear_bwd_ref",
    "lora_xs_linear_fwd_ref",
    "lora_xs_linear_ref",
    "qr_delta_ref",
    "qr_linear_bwd_ref",
    "qr_linear_fwd_ref",
    "qr_linear_ref",
]


HALF = (torch.float16, torch.bfloat16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else (contract 1 of the design)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _up(like: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(like.dtype)
    return tuple(t.to(dtype) for t in tensors)


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + b in the accumulation dtype."""
    x, weight = _up(x, x, weight)
    y = x @ weight.mT
    return y if bias is None else y + bias.to(y.dtype)


# --- The sum both other forms end in: y = x Wᵀ + b + addend


def linear_add_ref(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor) -> Tensor:
    """y [..., N] = x Wᵀ + b + addend, rounded once."""
    y = _base(x, weight, bias)
    return (y + addend.to(y.dtype)).to(x.dtype)


# --- QR-LoRA: ΔW = s · Q diag(λ) R̃ (arXiv 2508.21810, eq. 3), R̃ = R Pᵀ


def qr_delta_ref(q: Tensor, r: Tensor, lam: Tensor, scaling: float = 1.0) -> Tensor:
    """ΔW [N, K] from q [N, r], r [r, K] (original column order), lam [r]."""
    q, r, lam = _up(q, q, r, lam)
    return scaling * (q * lam) @ r


def qr_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    r: Tensor,
    lam: Tensor,
    scaling: float = 1.0,
) -> Tensor:
    """y [..., N] = x Wᵀ + b + s (x R̃ᵀ ∘ λ) Qᵀ."""
    xu, ru, qu, lu = _up(x, x, r, q, lam)
    h = xu @ ru.mT
    return (_base(x, weight, bias) + scaling * (h * lu) @ qu.mT).to(x.dtype)


def qr_linear_fwd_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    r: Tensor,
    lam: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Forward on x [M, K]; returns y [M, N] and what backward needs: h = x R̃ᵀ [M, r]."""
    xu, ru, qu, lu = _up(x, x, r, q, lam)
    h = xu @ ru.mT
    y = _base(x, weight, bias) + scaling * (h * lu) @ qu.mT
    return y.to(x.dtype), h.to(x.dtype)


def qr_linear_bwd_ref(
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
    dyu, wu, qu, ru, lu, hu = _up(dy, dy, weight, q, r, lam, h)
    g = dyu @ qu
    dx = (dyu @ wu + scaling * (g * lu) @ ru).to(dy.dtype) if need_dx else None
    dlam = (scaling * (hu * g).sum(0)).to(lam.dtype) if need_dlam else None
    return dx, dlam


# --- LoRA-XS: ΔW = s · B Cᵀ A with A = Σ_r V_rᵀ, B = U_r (arXiv 2405.17604, eq. 2)


def lora_xs_delta_ref(a: Tensor, b: Tensor, core: Tensor, scaling: float = 1.0) -> Tensor:
    """ΔW [N, K] from a [r, K], b [N, r], core [r, r]."""
    a, b, core = _up(a, a, b, core)
    return scaling * b @ core.mT @ a


def lora_xs_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    core: Tensor,
    scaling: float = 1.0,
) -> Tensor:
    """y [..., N] = x Wᵀ + b + s ((x Aᵀ) C) Bᵀ."""
    xu, au, bu, cu = _up(x, x, a, b, core)
    h = xu @ au.mT
    return (_base(x, weight, bias) + scaling * (h @ cu) @ bu.mT).to(x.dtype)


def lora_xs_linear_fwd_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    core: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Forward on x [M, K]; returns y [M, N] and h = x Aᵀ [M, r]."""
    xu, au, bu, cu = _up(x, x, a, b, core)
    h = xu @ au.mT
    y = _base(x, weight, bias) + scaling * (h @ cu) @ bu.mT
    return y.to(x.dtype), h.to(x.dtype)


def lora_xs_linear_bwd_ref(
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
    dyu, wu, au, bu, cu, hu = _up(dy, dy, weight, a, b, core, h)
    g = dyu @ bu
    dx = (dyu @ wu + scaling * (g @ cu.mT) @ au).to(dy.dtype) if need_dx else None
    dcore = (scaling * hu.mT @ g).to(core.dtype) if need_dcore else None
    return dx, dcore


# --- OHoRA: ΔW = s · (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ), applied as vec(BᵀZAᵀ) (EMNLP 2025, eq. 6)


def kron_delta_ref(
    a: Tensor,
    b: Tensor,
    a0: Tensor | None = None,
    b0: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """ΔW [N, K] materialised (R-Kron) from a [N/r, r], b [K/r, r]."""
    a, b = _up(a, a, b)
    delta = _kron(a, b.mT)
    if a0 is not None and b0 is not None:
        a0, b0 = _up(a0, a0, b0)
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


def kron_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None = None,
    b0: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """y [..., N] = x Wᵀ + b + s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x."""
    xu, au, bu = _up(x, x, a, b)
    update = _kron_apply(xu, au, bu)
    if a0 is not None and b0 is not None:
        update = update - _kron_apply(xu, *_up(x, a0, b0))
    return (_base(x, weight, bias) + scaling * update).to(x.dtype)


def kron_linear_fwd_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    scaling: float,
) -> Tensor:
    """Forward on x [M, K]; returns y [M, N]. Backward needs x alone."""
    return kron_linear_ref(x, weight, bias, a, b, a0, b0, scaling)


def kron_linear_bwd_ref(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    scaling: float,
    need_dx: bool = True,
    need_da: bool = True,
    need_db: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Per token S = X B, T = Aᵀ dY;  dA = s Σ dY Sᵀ;  dB = s Σ Xᵀ T;  dX = s (T Bᵀ − T₀ B₀ᵀ)."""
    dyu, xu, wu, au, bu = _up(dy, dy, x, weight, a, b)
    m, n, r, k = x.shape[0], a.shape[0], a.shape[1], b.shape[0]
    grads = dyu.reshape(m, n, r)
    tokens = xu.reshape(m, r, k)
    t = au.mT @ grads
    da = db = dx = None
    if need_da:
        da = (scaling * torch.einsum("mnj,mij->ni", grads, tokens @ bu)).to(a.dtype)
    if need_db:
        db = (scaling * torch.einsum("mik,mij->kj", tokens, t)).to(b.dtype)
    if need_dx:
        update = t @ bu.mT
        if a0 is not None and b0 is not None:
            a0u, b0u = _up(dy, a0, b0)
            update = update - (a0u.mT @ grads) @ b0u.mT
        dx = (dyu @ wu + scaling * update.reshape(xu.shape)).to(dy.dtype)
    return dx, da, db
