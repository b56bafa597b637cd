"""bf16 on CPUs with AMX: base and low-rank products in one fp32 accumulator, one rounding.

``y = [x, mid] · [W, up]ᵀ + b`` runs through the tile unit block by block: the update costs its own
arithmetic and no pass over y. The update is never rounded on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from . import cpu
from .chooser import Problem
from .composed import times

# Tokens summed at once where the contraction runs over tokens; bounds the kernel's scratch.
_TOKENS = 8192


def available() -> tuple[bool, str]:
    if native.CORE is None:
        return False, native.REASON
    if not native.CORE.amx_available():
        return False, "AMX (bf16) and AVX512-BF16 are not offered by this CPU, kernel or build"
    return True, "bf16 products on the AMX tile unit"


def supports(problem: Problem) -> tuple[bool, str]:
    if problem.device.type != "cpu":
        return False, "AMX is a CPU's"
    if problem.dtype != torch.bfloat16:
        return False, f"AMX kernels compute in bf16, not {problem.dtype}"
    if problem.op != "kron_linear" and problem.m >= 2048 and min(problem.n, problem.k) >= 1024:
        # 2048 x 1024 x 1024, forward and backward: 1.02 to 1.14 of the library products' time.
        return False, "library products measure better from 2,048 tokens of 1,024 features"
    ok, reason = available()
    return ok, reason if not ok else "base and update in one accumulator on the AMX tile unit"


# --- QR-LoRA ------------------------------------------------------------------------------------


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
    h, scaled = _scaled_product(x, r.mT, lam, scaling)
    return _product((x, weight.mT), (scaled, q.mT), bias=bias), h


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
    if not (need_dx or need_dlam):
        return None, None
    g, scaled = _scaled_product(dy, q, lam, scaling)
    dx = _product((dy, weight), (scaled, r)) if need_dx else None
    dlam = None
    if need_dlam:
        dlam = torch.empty(lam.shape, dtype=torch.float32)
        native.core().amx_column_dots(
            *g.shape, h.data_ptr(), h.stride(0), g.data_ptr(), g.stride(0), scaling, dlam.data_ptr()
        )
        dlam = dlam.to(lam.dtype)
    return dx, dlam


# --- LoRA-XS ------------------------------------------------------------------------------------


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
    h = _product((x, a.mT))
    mid = _product((h, times(scaling, core).to(x.dtype)))
    return _product((x, weight.mT), (mid, b.mT), bias=bias), h


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
    if not (need_dx or need_dcore):
        return None, None
    g = _product((dy, b))
    dx = dcore = None
    if need_dx:
        mid = _product((g, times(scaling, core).to(g.dtype).mT))
        dx = _product((dy, weight), (mid, a))
    if need_dcore:
        parts = [
            _product((h[i : i + _TOKENS].mT, g[i : i + _TOKENS]), out_dtype=torch.float32)
            for i in range(0, max(len(g), 1), _TOKENS)
        ]
        dcore = sum(parts[1:], start=parts[0]).mul_(scaling).to(core.dtype)
    return dx, dcore


# --- Kronecker and a given update ---------------------------------------------------------------


def kron_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    scaling: float,
) -> Tensor:
    """y = x Wᵀ + b + s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x on x [M, K]."""
    update = cpu.kron_update(x, a, b, a0, b0, scaling, tiles=True)
    return _product((x, weight.mT), bias=bias, addend=update, out=update)


def kron_linear_bwd(
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
    dx, da, db = cpu.kron_gradients(
        dy, x, a, b, a0, b0, scaling, need_dx, need_da, need_db, tiles=True
    )
    if dx is not None:
        dx = _product((dy, weight), addend=dx, out=dx)
    return dx, da, db


def linear_add_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor) -> Tensor:
    """y = x Wᵀ + b + addend on x [M, K], addend [M, N]."""
    return _product((x, weight.mT), bias=bias, addend=addend.contiguous())


# --- the one kernel -----------------------------------------------------------------------------


def _product(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor] | None = None,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """A₀B₀ + A₁B₁ + bias + addend, each pair as (A [M, depth], B [depth, N])."""
    m, n = first[0].shape[0], first[1].shape[1]
    if out is None:
        out = torch.empty(m, n, dtype=out_dtype)
    bias = None if bias is None else bias.contiguous()
    _run(first, second, out, bias=bias, addend=addend)
    return out


def _scaled_product(x: Tensor, down: Tensor, lam: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """h = x down, and s (h ∘ λ) from the unrounded h."""
    h = torch.empty(x.shape[0], down.shape[1], dtype=torch.bfloat16)
    scaled = torch.empty_like(h)
    scale = times(scaling, lam.float())
    _run((x, down), None, h, scale=scale, scaled=scaled)
    return h, scaled


def _run(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor] | None,
    out: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    scale: Tensor | None = None,
    scaled: Tensor | None = None,
) -> None:
    # Held until the kernel returns: these may be copies in a layout that it reads.
    pairs = [tuple(map(_readable, pair)) for pair in (first, second) if pair is not None]
    arguments = [(_matrix(a), _matrix(b), a.shape[1]) for a, b in pairs]
    native.core().amx_gemm(
        *out.shape, arguments[0], arguments[1] if second is not None else None,
        _pointer(bias), _pointer(addend), _pointer(scale), _pointer(scaled),
        out.data_ptr(), out.stride(0), out.dtype == torch.float32, torch.get_num_threads(),
    )  # fmt: skip


def _readable(t: Tensor) -> Tensor:
    """``t`` with at least one dimension contiguous."""
    return t if 1 in t.stride() else t.clone(memory_format=torch.contiguous_format)


def _matrix(t: Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), t.stride(0), t.stride(1)


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
