"""What the chooser is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operands import Kron, KronGradient, LinearAdd, LowRank, LowRankGradient, Operands

GATES = ("vector", "core", "mixed_vector", "mixed_core")
# What the public functions are called, by operation and gate.
PUBLIC_NAMES = {
    ("low_rank", "vector"): "qr_linear",
    ("low_rank", "core"): "lora_xs_linear",
    ("low_rank", "mixed_vector"): "mixed_low_rank_linear",
    ("low_rank", "mixed_core"): "mixed_low_rank_linear",
    ("kron", ""): "kron_linear",
    ("linear_add", ""): "linear_add",
}
OPERATIONS = {
    "qr_linear": ("low_rank", "vector"),
    "lora_xs_linear": ("low_rank", "core"),
    "mixed_low_rank_linear": ("low_rank", "mixed_vector"),
    "kron_linear": ("kron", ""),
}
_ALL_NEEDED = {"low_rank": (True, True), "kron": (True, True, True), "linear_add": ()}


class Problem(NamedTuple):
    """One step of one operation: all that a choice may depend on; hashable.

    ``op`` is ``"low_rank"``, ``"kron"`` or ``"linear_add"``, or the name of a public function,
    which stands for one of them with its gate. ``device`` is the device with its index; ``m, n, k,
    r`` are tokens, output features, input features and the rank.

    ``step`` is ``"fwd"`` or ``"bwd"``; ``gate`` one of ``"vector"``, ``"core"``,
    ``"mixed_vector"`` and ``"mixed_core"``, ``""`` for other operations; ``form`` is
    ``"two_sided"`` or ``"output"``; ``layout`` says how the weight lies: ``"rows"`` [N, K] that are
    contiguous, ``"columns"`` that are, or ``"strided"``. ``bias``: whether a forward adds one.
    ``needs``: which gradients a backward is asked for.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    m: int
    n: int
    k: int
    r: int
    step: str = "fwd"
    gate: str = "vector"
    form: str = "two_sided"
    layout: str = "rows"
    bias: bool = True
    needs: tuple[bool, ...] = ()

    @property
    def public_name(self) -> str:
        """The public function that asks this."""
        return PUBLIC_NAMES.get((self.op, self.gate), self.op)


# What the native core knows a recipe by where it has no kernel for it: the step is not to be taken
# there; or it is one of library products, whose operands the core reads and checks all the same.
ELSEWHERE, LIBRARY_PRODUCTS = -1, 0


class Recipe(NamedTuple):
    """One way in which a backend computes one step."""

    backend: str
    name: str
    reason: str  # in a few words, what it is good for
    code: int = ELSEWHERE  # what the native core knows it by


class Choice(NamedTuple):
    """The backend of a step and how it does it, and why this and not a preferred one."""

    backend: str
    recipe: str
    reason: str

    @property
    def name(self) -> str:
        """The backend."""
        return self.backend


def joined(problem: Problem) -> Problem:
    """The same problem in the words of the operations, with nothing left to say."""
    op, gate = OPERATIONS.get(problem.op, (problem.op, problem.gate))
    if (problem.op, problem.gate) == ("mixed_low_rank_linear", "mixed_core"):
        gate = problem.gate
    gate = (gate or "vector") if op == "low_rank" else ""
    needs, bias = problem.needs, problem.bias
    if problem.step == "bwd":
        needs, bias = needs or _ALL_NEEDED[op], False
    return problem._replace(op=op, gate=gate, needs=needs, bias=bias)


def layout_of(weight: Tensor) -> str:
    """How the weight [N, K] lies."""
    if weight.stride(1) == 1:
        return "rows"
    return "columns" if weight.stride(0) == 1 else "strided"


def problem_of(p: Operands) -> Problem:
    """What the chooser is asked for these operands."""
    weight = p.weight
    layout = "rows" if weight.stride(1) == 1 else layout_of(weight)
    return _PROBLEMS[type(p)](p, layout)


def _of_low_rank(p: LowRank, layout: str) -> Problem:
    (n, k), x = p.weight.shape, p.x
    which = ("fwd", *_gate_and_form(p), layout, p.bias is not None)
    return Problem("low_rank", x.device, x.dtype, x.shape[0], n, k, p.gate.shape[-1], *which)


def _of_low_rank_gradient(p: LowRankGradient, layout: str) -> Problem:
    (n, k), dy = p.weight.shape, p.dy
    which = ("bwd", *_gate_and_form(p), layout, False, (p.need_dx, p.need_dgate))
    return Problem("low_rank", dy.device, dy.dtype, dy.shape[0], n, k, p.gate.shape[-1], *which)


def _gate_and_form(p: LowRank | LowRankGradient) -> tuple[str, str]:
    """[A, r] and [r, r] do not tell by themselves which kind of gate they are."""
    mixed = p.index is not None
    core = p.gate.ndim - mixed == 2
    return GATES[2 * mixed + core], "output" if p.down is None else "two_sided"


def _of_kron(p: Kron, layout: str) -> Problem:
    (n, k), x = p.weight.shape, p.x
    which = ("fwd", "", "two_sided", layout, p.bias is not None)
    return Problem("kron", x.device, x.dtype, x.shape[0], n, k, p.a.shape[1], *which)


def _of_kron_gradient(p: KronGradient, layout: str) -> Problem:
    (n, k), x = p.weight.shape, p.x
    which = ("bwd", "", "two_sided", layout, False, (p.need_dx, p.need_da, p.need_db))
    return Problem("kron", x.device, x.dtype, x.shape[0], n, k, p.a.shape[1], *which)


def _of_linear_add(p: LinearAdd, layout: str) -> Problem:
    (n, k), x = p.weight.shape, p.x
    which = ("fwd", "", "two_sided", layout, p.bias is not None)
    return Problem("linear_add", x.device, x.dtype, x.shape[0], n, k, n, *which)


_PROBLEMS: dict[type, Callable[[Any, str], Problem]] = {
    LowRank: _of_low_rank,
    LowRankGradient: _of_low_rank_gradient,
    Kron: _of_kron,
    KronGradient: _of_kron_gradient,
    LinearAdd: _of_linear_add,
}
