"""bf16 on CPUs with AMX: base and low-rank products in one fp32 accumulator, one rounding.

``y = [x, mid] · [W, up]ᵀ + b`` runs through the tile unit block by block: the update costs its own
arithmetic and no pass over y. The update is never rounded on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from . import cpu
from .base_product import linear_add
from .low_rank import lora_xs_linear_bwd, lora_xs_linear_fwd, qr_linear_bwd, qr_linear_fwd
from .problem import Problem

__all__ = [
    "available",
    "kron_linear_bwd",
    "kron_linear_fwd",
    "linear_add_fwd",
    "lora_xs_linear_bwd",
    "lora_xs_linear_fwd",
    "qr_linear_bwd",
    "qr_linear_fwd",
    "supports",
]


def available() -> tuple[bool, str]:
    if native.CORE is None:
        return False, native.REASON
    if obstacle := native.CORE.amx_obstacle():
        return False, f"bf16 on the AMX tile unit: {obstacle}"
    return True, "bf16 products on the AMX tile unit"


def supports(problem: Problem) -> tuple[bool, str]:
    if problem.device.type != "cpu":
        return False, "AMX is a CPU's"
    if problem.dtype != torch.bfloat16:
        return False, f"AMX kernels compute in bf16, not {problem.dtype}"
    ok, reason = available()
    return ok, reason if not ok else "base and update in one accumulator on the AMX tile unit"


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
    linear_add(x, weight, bias, update, out=update)
    return update


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
        linear_add(dy, weight.mT, None, dx, out=dx)
    return dx, da, db


def linear_add_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor) -> Tensor:
    """y = x Wᵀ + b + addend on x [M, K], addend [M, N]."""
    y = x.new_empty(addend.shape)
    linear_add(x, weight, bias, addend, out=y)
    return y
