"""bf16 on CPUs with AMX: base and low-rank products in one fp32 accumulator, one rounding.

``y = [x, mid] · [W, up]ᵀ + b`` runs through the tile unit block by block: the update costs its own
arithmetic and no pass over y. The update is never rounded on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch.problem import Problem, Recipe
from ..operands import Kron, KronGradient, LinearAdd, LowRank, LowRankGradient
from . import core_calls

NATIVE = "native"


def available() -> tuple[bool, str]:
    if native.CORE is None:
        return False, native.REASON
    if obstacle := native.CORE.amx_obstacle():
        return False, f"bf16 on the AMX tile unit: {obstacle}"
    return True, "bf16 products on the AMX tile unit"


def supports(problem: Problem) -> list[Recipe] | str:
    """The recipes that run ``problem``, best first, or why there is none."""
    if problem.device.type != "cpu":
        return "AMX is a CPU's"
    if problem.dtype != torch.bfloat16:
        return f"AMX kernels compute in bf16, not {problem.dtype}"
    ok, reason = available()
    if not ok:
        return reason
    if problem.form == "output" or problem.gate.startswith("mixed"):
        return "no AMX kernel for the output form and for mixed gates"
    reason = "base and update in one accumulator on the AMX tile unit"
    return [Recipe("amx", NATIVE, reason, core_calls.code("amx"))]


def low_rank_fwd(p: LowRank, recipe: str) -> tuple[Tensor, Tensor]:
    """y [M, N] and h [M, r]."""
    return core_calls.low_rank_fwd(p, core_calls.code("amx"))


def low_rank_bwd(p: LowRankGradient, recipe: str) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] and the gate's gradient."""
    return core_calls.low_rank_bwd(p, core_calls.code("amx"))


def kron_fwd(p: Kron, recipe: str) -> Tensor:
    """y [M, N]."""
    code = core_calls.code("amx")
    y = core_calls.kron_update(p, code)
    core_calls.linear_add(code, p.x, p.weight, p.bias, y, out=y)
    return y


def kron_bwd(p: KronGradient, recipe: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx [M, K], dA and dB."""
    code = core_calls.code("amx")
    dx, da, db = core_calls.kron_gradients(p, code)
    if dx is not None:
        core_calls.linear_add(code, p.dy, p.weight.mT, None, dx, out=dx)
    return dx, da, db


def linear_add_fwd(p: LinearAdd, recipe: str) -> Tensor:
    """y [M, N] = x Wᵀ + b + addend."""
    y = p.x.new_empty(p.addend.shape)
    core_calls.linear_add(core_calls.code("amx"), p.x, p.weight, p.bias, p.addend, out=y)
    return y
