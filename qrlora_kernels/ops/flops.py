"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operators.

It counts the products, 2 for each multiplication and addition, as it does for the plain
expressions. Its module brings Triton along, so it is never imported here: the formulas are handed
over when a mode is active at a call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..operands import Kron, KronGradient, LinearAdd, LowRank, LowRankGradient, is_core

_formulas: dict[Any, Callable[..., int]] = {}


def add(operator: Any, formula: Callable[..., int]) -> None:
    """``formula``: the operator's own arguments -> operations."""

    def counted(*operands: Any, out_val: Any = None, **options: Any) -> int:
        return formula(*operands, **options)

    counted._get_raw = True  # type: ignore[attr-defined]  # tensors, and not their shapes
    _formulas[operator] = counted


def register() -> None:
    """Let active counters, and those to come, know the formulas."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    counter.flop_registry.update(_formulas)
    for mode in _get_current_dispatch_mode_stack():
        counting = getattr(mode, "counter", None)
        if isinstance(counting, counter.FlopCounterMode):
            counting.flop_registry.update(_formulas)


def linear_add(p: LinearAdd) -> int:
    m, k = p.x.shape
    return 2 * m * k * p.weight.shape[0]


def low_rank_fwd(p: LowRank) -> int:
    (m, k), n, r = p.x.shape, p.weight.shape[0], p.gate.shape[-1]
    inner = n if p.down is None else k
    return 2 * m * (n * k + r * (inner + n) + _core(p))


def low_rank_bwd(p: LowRankGradient) -> int:
    (m, n), k, r = p.dy.shape, p.weight.shape[1], p.gate.shape[-1]
    outer = n if p.down is None else k
    products = n * r
    if p.need_dx:
        products += n * k + r * outer + _core(p)
    if p.need_dgate:
        products += _core(p)
    return 2 * m * products


def _core(p: LowRank | LowRankGradient) -> int:
    """r² for a core; a vector is no product."""
    r = p.gate.shape[-1]
    return r * r if is_core(p) else 0


def kron_fwd(p: Kron) -> int:
    (m, k), n, r = p.x.shape, p.weight.shape[0], p.a.shape[1]
    return 2 * m * (n * k + _terms(p) * r * (k + n))


def kron_bwd(p: KronGradient) -> int:
    (m, k), n, r = p.x.shape, p.weight.shape[0], p.a.shape[1]
    update = r * (k + n)
    products = (n * k + _terms(p) * update) * p.need_dx + update * (p.need_da + p.need_db)
    return 2 * m * products


def _terms(p: Kron | KronGradient) -> int:
    return 1 if p.a0 is None else 2
