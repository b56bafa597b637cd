"""What the chooser is asked, and what it answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..operands import (
    InPanels,
    Kron,
    KronGradient,
    LinearAdd,
    LowRank,
    LowRankGradient,
    Operands,
    is_core,
)

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
    contiguous, ``"columns"`` that are, ``"strided"``, or ``"panels"`` where the frozen operands are
    kept in panels as well. ``bias``: whether a forward adds one.
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


PANELS = "panels"  # the recipe by operands that are kept so

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
    rows, weight = p[0], p.weight
    n, k = weight.shape
    layout = "rows" if weight.stride(1) == 1 else layout_of(weight)
    form, gate = "two_sided", ""
    match p:
        case LowRank() | LowRankGradient():
            op, r = "low_rank", p.gate.shape[-1]
            gate = GATES[2 * (p.index is not None) + is_core(p)]
            if p.down is None:
                form = "output"
        case Kron() | KronGradient():
            op, r = "kron", p.a.shape[1]
        case LinearAdd():
            op, r = "linear_add", n
    match p:  # no call, each of which counts here
        case InPanels():
            layout = "panels"
    step, bias = "bwd", False
    needs: tuple[bool, ...] = ()
    match p:
        case LowRankGradient():
            needs = p.need_dx, p.need_dgate
        case KronGradient():
            needs = p.need_dx, p.need_da, p.need_db
        case _:
            step, bias = "fwd", p.bias is not None
    return Problem(
        op, rows.device, rows.dtype, rows.shape[0], n, k, r,
        step, gate, form, layout, bias, needs,
    )  # fmt: skip
