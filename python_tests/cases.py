"""The operands of one operation, drawn in every gate and form, with the exact results.

A ``Case`` runs a backend's forward and backward on its operands, and the same mathematics as the
plain PyTorch expression under autograd: in fp64 as the truth, in the operands' dtype for the
comparison with eager over many draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qrlora_kernels.dispatch.chooser import choose, perform
from qrlora_kernels.dispatch.problem import GATES, Choice, problem_of
from qrlora_kernels.operands import Kron, KronGradient, LowRank, LowRankGradient, Operands

SCALING = 0.7
ADAPTERS = 5  # of a mixed gate; the last is in no row


class Kind(NamedTuple):
    """An operation, and of low rank its gate and form, in the words of ``Problem``."""

    op: str
    gate: str = ""
    form: str = "two_sided"


KRON = Kind("kron")
LOW_RANK = tuple(Kind("low_rank", gate, form) for form in ("two_sided", "output") for gate in GATES)
VECTOR, CORE, MIXED_VECTOR, MIXED_CORE = LOW_RANK[:4]
KINDS = (KRON, *LOW_RANK)


@dataclass(frozen=True)
class Case:
    """Operands of one forward and the gradient dy that comes back to it."""

    p: LowRank | Kron
    dy: Tensor

    @property
    def trains(self) -> tuple[str, ...]:
        """The operands that train, by name."""
        return ("a", "b") if isinstance(self.p, Kron) else ("gate",)

    def given(self, **changed: Any) -> Case:
        """The same case but for some operands; ``dy`` counts as one."""
        dy = changed.pop("dy", self.dy)
        return Case(self.p._replace(**changed), dy)

    def forward(self, backend: ModuleType) -> tuple[Tensor, Tensor | None]:
        """y and, where the operation keeps one, h."""
        made = step(backend, self.p)
        return (made, None) if isinstance(self.p, Kron) else made[:2]  # it may hand on more

    def backward(self, backend: ModuleType, h: Tensor | None, *needs: bool) -> tuple[Any, ...]:
        return step(backend, self.gradient(h, *needs))

    def gradient(self, h: Tensor | None, *needs: bool) -> Operands:
        """The record of the backward."""
        if isinstance(self.p, Kron):
            x, weight, _, *rest = self.p
            return KronGradient(self.dy, x, weight, *rest, *needs)
        _, weight, _, *rest, scaling = self.p
        return LowRankGradient(self.dy, weight, *rest, h, scaling, *needs)

    def run(self, backend: ModuleType) -> dict[str, Tensor]:
        """y and the gradients, by the operand's name."""
        y, h = self.forward(backend)
        grads = self.backward(backend, h)
        return dict(zip(("y", "x", *self.trains), (y, *grads), strict=True))

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The plain expression and its autograd, everything in ``dtype``."""
        leaves = ("x", *self.trains)
        fields = {
            name: t.to(dtype, copy=True) if isinstance(t, Tensor) and name != "index" else t
            for name, t in self.p._asdict().items()
        }
        p = type(self.p)(**fields)
        for name in leaves:
            fields[name].requires_grad_()
        update = _kron_update(p) if isinstance(p, Kron) else _low_rank_update(p)
        y = F.linear(p.x, p.weight, p.bias) + p.scaling * update
        grads = torch.autograd.grad(y, [fields[name] for name in leaves], self.dy.to(dtype))
        return dict(zip(("y", *leaves), (y.detach(), *grads), strict=True))


def step(backend: ModuleType, p: Operands, recipe: str | None = None) -> Any:
    """The step on ``backend`` by ``recipe``, or by the one that it takes when asked for."""
    problem = problem_of(p)
    name = backend.__name__.rpartition(".")[2]
    if recipe is None:
        recipe = choose(problem, name).recipe
    return perform(Choice(name, recipe, "asked for"), f"{problem.op}_{problem.step}", p)


def _low_rank_update(p: LowRank) -> Tensor:
    """gate(h) upᵀ as one would write it for each row."""
    r = p.gate.shape[-1]
    up = p.up[:, :r]
    h = (p.x @ p.weight.mT) @ up if p.down is None else p.x @ p.down[:r].mT
    if p.index is None:
        return (h * p.gate if p.gate.dim() == 1 else h @ p.gate) @ up.mT
    gates = p.gate[p.index]
    return (h * gates if gates.dim() == 2 else (h[:, None] @ gates)[:, 0]) @ up.mT


def _kron_update(p: Kron) -> Tensor:
    tokens = p.x.reshape(-1, p.a.shape[1], p.b.shape[0])
    y = p.a @ (tokens @ p.b)
    if p.a0 is not None and p.b0 is not None:
        y = y - p.a0 @ (tokens @ p.b0)
    return y.reshape(p.x.shape[0], -1)


def draw(
    kind: Kind,
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    *,
    train_dtype: torch.dtype | None = None,
    bias: bool = True,
    start: bool = True,
    wide: int = 0,
    size: float = 0.1,
    seed: int = 0,
) -> Case:
    """Random operands whose update is about ``size`` times the base product.

    The factors of low rank are wider than the gate by ``wide``, with NaN there.
    """
    draws = _Draws(seed, dtype, train_dtype or dtype)
    if kind == KRON:
        factors = _kron_factors(draws, n, k, r, start, size)
    else:
        factors = _low_rank_factors(draws, kind, m, n, k, r, wide, size)
    x, dy, weight = draws.normal(m, k), draws.normal(m, n), draws.normal(n, k, std=k**-0.5)
    operands = x, weight, draws.normal(n) if bias else None, *factors, SCALING
    return Case(Kron(*operands) if kind == KRON else LowRank(*operands), dy)


class _Draws:
    """Normal numbers drawn in fp64 and rounded to the dtype of frozen or trained operands."""

    def __init__(self, seed: int, dtype: torch.dtype, train_dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.train_dtype = dtype, train_dtype

    def normal(self, *shape: int, std: float = 1.0, trains: bool = False) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return (std * drawn).to(self.train_dtype if trains else self.dtype)


def _kron_factors(
    draws: _Draws, n: int, k: int, r: int, start: bool, size: float
) -> tuple[Tensor | None, ...]:
    std = (r * k) ** -0.25
    a, b = (draws.normal(rows // r, r, std=std, trains=True) for rows in (n, k))
    if not start:
        return a, b, None, None
    step_a, step_b = (draws.normal(*t.shape, std=size * std, trains=True) for t in (a, b))
    return a + step_a, b + step_b, a, b


def _low_rank_factors(
    draws: _Draws, kind: Kind, m: int, n: int, k: int, r: int, wide: int, size: float
) -> tuple[Tensor | None, ...]:
    """up, down, gate and index; h is about 1 in either form."""
    down = None
    up = draws.normal(n, r + wide, std=r**-0.5)
    if kind.form == "output":
        up, size = up * (r / n) ** 0.5, size * (n / r) ** 0.5
    else:
        down = draws.normal(r + wide, k, std=k**-0.5)
        down[r:] = torch.nan
    up[:, r:] = torch.nan
    core, mixed = kind.gate.endswith("core"), kind.gate.startswith("mixed")
    shape = (*(ADAPTERS,) * mixed, *(r, r)[: 1 + core])
    gate = draws.normal(*shape, std=size * r**-0.5 if core else size, trains=True)
    index = None
    if mixed:
        index = torch.randint(ADAPTERS - 1, (m,), generator=draws.generator)
    return up, down, gate, index
