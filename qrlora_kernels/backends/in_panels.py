"""Steps on frozen operands that are kept in panels, in the order in which the products read them.

The update meets the base product in one sum, without a pass over y or dx.
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch.problem import ELSEWHERE, PANELS, Problem, Recipe
from ..operands import InPanels, LowRank, LowRankGradient
from .gates import back_through_gate, gate_gradient, through_gate
from .products import times


def recipes(problem: Problem, code: int = ELSEWHERE) -> list[Recipe]:
    """The one for operands in panels, where they are; the native core knows it by ``code``."""
    if problem.layout != "panels" or problem.gate.startswith("mixed"):
        return []
    return [Recipe("cpu", PANELS, "products by operands kept in panels", code)]


def low_rank_fwd(p: LowRank) -> tuple[Tensor, Tensor]:
    """y [M, N] and h [M, r]."""
    assert isinstance(p, InPanels)
    h = p.kept.into.product(p.x)
    mid = through_gate(h, p.gate, p.index, p.scaling)
    return p.kept.base.product(p.x, p.bias, (mid, p.kept.out)), h


def low_rank_bwd(p: LowRankGradient) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] and the gate's gradient."""
    if not (p.need_dx or p.need_dgate):
        return None, None
    assert isinstance(p, InPanels)
    g = p.kept.into.product(p.dy)
    dx = dgate = None
    if p.need_dx:
        mid = back_through_gate(g, p.gate, p.index, p.scaling)
        dx = p.kept.base.product(p.dy, None, (mid, p.kept.out))
    if p.need_dgate:
        dgate = times(p.scaling, gate_gradient(p, g)).to(p.gate.dtype)
    return dx, dgate
