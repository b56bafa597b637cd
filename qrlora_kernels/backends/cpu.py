"""Native CPU kernels (``qrlora_kernels._C``) for what library products do badly: few tokens, many
small products, and base and update in one sum.

The Kronecker update is many small products per token: the kernels keep them in the L1 cache, read x
and dy once and write the update once; the base product then accumulates onto it, in one rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch.problem import PANELS, Problem, Recipe
from ..native import DTYPES
from ..operands import InPanels, Kept, Kron, KronGradient, LinearAdd, LowRank, LowRankGradient
from . import core_calls, products

NATIVE = "native"
NATIVE_BASE = "native base"
_LIBRARY_BASE = " base"  # after the name of a library's base product


def available() -> tuple[bool, str]:
    return native.CORE is not None, native.REASON


def supports(problem: Problem) -> list[Recipe] | str:
    """The recipes that run ``problem``, best first, or why there is none."""
    if problem.device.type != "cpu":
        return "native kernels run on the CPU only"
    if native.CORE is None:
        return native.REASON
    if problem.op == "kron":
        return _kron_recipes(problem)
    half = problem.dtype == torch.bfloat16
    if problem.dtype not in DTYPES:
        return f"no native {problem.op} kernel for {problem.dtype}"
    if problem.form == "output":
        return "no native kernel for the output form"
    if half and problem.gate.startswith("mixed"):
        return "no native kernel for mixed gates in bf16"
    reason = "base and update in one sum, in one native call"
    kept = _by_panels(problem, core_calls.code(by_panels=True))
    return [*kept, Recipe("cpu", NATIVE, reason, core_calls.code())]


def _kron_recipes(problem: Problem) -> list[Recipe] | str:
    if problem.dtype not in DTYPES and problem.dtype != torch.float16:
        return f"no native kernel for {problem.dtype}"
    reason = "the Kronecker update in one native pass over the tokens"
    update = core_calls.code(update_alone=True)
    recipes = [
        Recipe("cpu", how + _LIBRARY_BASE, reason, update) for how in products.bases(problem)
    ]
    if problem.dtype in DTYPES:
        recipes.insert(0, Recipe("cpu", NATIVE_BASE, reason, core_calls.code()))
    return [*_by_panels(problem, update), *recipes]


def _by_panels(problem: Problem, code: int) -> list[Recipe]:
    """The recipe for frozen operands in panels, where they are, and ``code`` knows it."""
    if problem.layout != "panels" or problem.gate.startswith("mixed"):
        return []
    return [Recipe("cpu", PANELS, "products by operands kept in panels", code)]


def low_rank_fwd(p: LowRank, recipe: str) -> tuple[Tensor, Tensor]:
    """y [M, N] and h [M, r]."""
    panels = _addresses(p) if recipe == PANELS else core_calls.NO_PANELS
    return core_calls.low_rank_fwd(p, core_calls.code(), panels)


def low_rank_bwd(p: LowRankGradient, recipe: str) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] and the gate's gradient."""
    panels = _addresses(p) if recipe == PANELS else core_calls.NO_PANELS
    return core_calls.low_rank_bwd(p, core_calls.code(), panels)


def _addresses(p: LowRank | LowRankGradient) -> tuple[int, ...]:
    """Of the operands in panels."""
    assert isinstance(p, InPanels)
    return tuple(matrix.address for matrix in p.kept)


def kron_fwd(p: Kron, recipe: str) -> Tensor:
    """y [M, N]."""
    update = core_calls.kron_update(p, core_calls.code(update_alone=True))
    kept = _kept(p) if recipe == PANELS else None
    return add_base(recipe, update, p.x, p.weight, p.bias, kept)


def kron_bwd(p: KronGradient, recipe: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx [M, K], dA and dB."""
    dx, da, db = core_calls.kron_gradients(p, core_calls.code(update_alone=True))
    if dx is not None:
        kept = _kept(p) if recipe == PANELS else None
        dx = add_base(recipe, dx, p.dy, p.weight.mT, None, kept)
    return dx, da, db


def _kept(p: Kron | KronGradient) -> Kept:
    assert isinstance(p, InPanels)
    kept: Kept = p.kept
    return kept


def add_base(
    recipe: str,
    update: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: Kept | None = None,
) -> Tensor:
    """x Wᵀ + b + update, in the update's place where the product allows it; ``kept``: W in panels,
    for the recipe that reads them."""
    if recipe == PANELS:
        assert kept is not None
        return kept.product(x, bias, onto=update)
    if recipe == NATIVE_BASE:
        core_calls.linear_add(core_calls.code(), x, weight, bias, update, out=update)
        return update
    return products.onto(recipe.removesuffix(_LIBRARY_BASE), update, x, weight, bias)


def linear_add_fwd(p: LinearAdd, recipe: str) -> Tensor:
    """y [M, N] = x Wᵀ + b + addend."""
    y = p.x.new_empty(p.addend.shape)
    core_calls.linear_add(core_calls.code(), p.x, p.weight, p.bias, p.addend, out=y)
    return y
