"""What a CPU's library gives by hand: its own frozen layer, LoRA over that, and compositions.

Of the compositions those that keep the contracts of precision; where one would break them, or could
only be slower, it is absent and says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ..problem import TRAINABLES, LayerProblem, Runner, Unavailable
from . import compositions as c
from .onednn import Library, OneDNN
from .plain import Plain
from .registry import Layer

FROZEN_PACKED = "frozen packed"
OVER_FROZEN, OVER_PACKED = "over frozen", f"over {FROZEN_PACKED}"
Base = Callable[[LayerProblem], c.Frozen]


def rivals() -> list[Layer]:
    """The frozen layer packed, LoRA over both frozen layers, and the families' compositions.

    Layers of one call share what they lay out of a problem's frozen weight.
    """
    library, dense, packed = map(functools.cache, (_library, _dense, _packed))
    found = [
        Layer(FROZEN_PACKED, "", lambda problem: Runner(Plain(packed(problem)))),
        Layer(OVER_FROZEN, "lora", functools.partial(_lora, library)),
        Layer(OVER_PACKED, "lora", functools.partial(_lora, packed)),
    ]
    for base, suffix in ((dense, ""), (packed, " packed")):
        found.append(Layer(f"update first{suffix}", "ohora", functools.partial(_kron, base)))
        found += [
            Layer(name + suffix, family, functools.partial(_low_rank, family, name, base))
            for family in c.GATES
            for name in _COMPOSITIONS
        ]
    # Its weight is another one at every step, so there is nothing to pack. oneDNN has no fp64.
    for family in c.GATES:
        build = functools.partial(_effective, family, library, dense)
        found.append(Layer("effective weight", family, build))
    return found


def _library(problem: LayerProblem) -> c.Frozen:
    return c.Frozen(problem.weight, problem.bias, Library)


def _dense(problem: LayerProblem, packed: bool = False) -> c.Frozen:
    layout = functools.partial(OneDNN, packed=packed, tokens=problem.case.m)
    return c.Frozen(problem.weight, problem.bias, layout)


def _packed(problem: LayerProblem) -> c.Frozen:
    return _dense(problem, packed=True)


def runner(family: str, composition: c.Composition, problem: LayerProblem) -> Runner:
    """The composition with the family's trainables as the layer's own."""
    operands = problem.operands(family)
    trainables = {name: operands[name] for name in TRAINABLES[family]}
    return Runner(Plain(lambda x: composition(x, *trainables.values())), trainables)


def low_rank(family: str, kind: type[c.LowRank], base: c.Frozen, problem: LayerProblem) -> Runner:
    """One of the low-rank families by a composition over ``base``."""
    operands = problem.operands(family)
    up, down = (operands[name] for name in _FACTORS[family])
    return runner(family, kind(base, up, down, c.GATES[family]), problem)


def _low_rank(family: str, name: str, base: Base, problem: LayerProblem) -> Runner:
    kind, refusal = _COMPOSITIONS[name]
    _refuse(refusal(problem))
    return low_rank(family, kind, base(problem), problem)


def _effective(family: str, library: Base, dense: Base, problem: LayerProblem) -> Runner:
    case = problem.case
    if _is_half(problem):
        _refuse("in half precision it rounds W + ΔW")
    if case.m * (case.n + case.k) <= case.n * case.k:
        _refuse("up to N K / (N + K) tokens W + ΔW is dearer than their updates")
    base = library if problem.dtype == torch.float64 else dense
    return low_rank(family, c.EffectiveWeight, base(problem), problem)


def _kron(base: Base, problem: LayerProblem) -> Runner:
    start = problem.operands("ohora")
    return runner("ohora", c.Kron(base(problem), start["a0"], start["b0"]), problem)


def _lora(base: Base, problem: LayerProblem) -> Runner:
    found = runner("lora", c.LoRA(base(problem)), problem)
    found.rank = found.trainables["a"].shape[0]
    return found


# --- where they are absent


def _refuse(reason: str) -> None:
    if reason:
        raise Unavailable(reason)


def _is_half(problem: LayerProblem) -> bool:
    return problem.dtype in (torch.bfloat16, torch.float16)


def _nowhere(problem: LayerProblem) -> str:
    return ""


def _in_half(problem: LayerProblem) -> str:
    return "in half precision it rounds y before the update" if _is_half(problem) else ""


def _in_half_or_tall(problem: LayerProblem) -> str:
    if problem.case.n > problem.case.k:
        return "where N > K the input is the shorter side"
    return _in_half(problem)


def _unless_half(problem: LayerProblem) -> str:
    return "" if _is_half(problem) else "in half precision alone one rounding is saved"


_FACTORS = {"qr": ("q", "r"), "lora_xs": ("b", "a")}
_COMPOSITIONS: dict[str, tuple[type[c.LowRank], Callable[[LayerProblem], str]]] = {
    "update first": (c.UpdateFirst, _nowhere),
    "base first": (c.BaseFirst, _in_half),
    "output side": (c.OutputSide, _in_half_or_tall),
    "stacked": (c.Stacked, _in_half),
    "one accumulator": (c.OneAccumulator, _unless_half),
}
