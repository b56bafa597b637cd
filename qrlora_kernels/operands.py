"""The operands of a step as one record, which goes whole from the checks to the kernel.

Shapes: x [M, K], weight W [N, K], bias [N], dy and y [M, N]; r is the gate's rank and s the
scaling. Factors may be wider than the gate: columns of ``up`` and rows of ``down`` from r on do not
count, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor


class Kept(Protocol):
    """A frozen matrix W [N, K] in a layout of its own, at ``address``."""

    address: int

    def product(self, x: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """y [M, N] = x Wᵀ + b, and ``onto`` [M, N], which holds y then."""


class KeptOperands(NamedTuple):
    """The frozen operands of a low-rank step as their products read them.

    Forward W, down and up; backward, which is the same step on dy, Wᵀ, upᵀ and downᵀ.
    """

    base: Kept
    into: Kept
    out: Kept


class LowRank(NamedTuple):
    """y = x Wᵀ + b + s · gate(h) upᵀ, with h = x downᵀ or, without ``down``, h = (x Wᵀ) up.

    ``gate`` is λ [r], h ∘ λ (QR-LoRA), or C [r, r], h C (LoRA-XS). With ``index`` [M] of int64 it
    has one more dimension in front, [A, r] or [A, r, r], and row m takes the gate ``index[m]``.
    ``up`` is [N, ≥ r], ``down`` [≥ r, K]. Without ``down`` (the output form) h is made of x Wᵀ
    before the bias is added and before anything is rounded.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    up: Tensor
    down: Tensor | None
    gate: Tensor
    index: Tensor | None  # type: ignore[assignment]  # nobody asks for tuple's
    scaling: float


class LowRankGradient(NamedTuple):
    """What the backward of :class:`LowRank` takes: h [M, r] is what the forward keeps for it."""

    dy: Tensor
    weight: Tensor
    up: Tensor
    down: Tensor | None
    gate: Tensor
    index: Tensor | None  # type: ignore[assignment]  # nobody asks for tuple's
    h: Tensor
    scaling: float
    need_dx: bool = True
    need_dgate: bool = True


class Kron(NamedTuple):
    """y = x Wᵀ + b + s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x; a and a0 [N/r, r], b and b0 [K/r, r] (OHoRA)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    a0: Tensor | None
    b0: Tensor | None
    scaling: float


class KronGradient(NamedTuple):
    """What the backward of :class:`Kron` takes."""

    dy: Tensor
    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    a0: Tensor | None
    b0: Tensor | None
    scaling: float
    need_dx: bool = True
    need_da: bool = True
    need_db: bool = True


class LinearAdd(NamedTuple):
    """y = x Wᵀ + b + addend, addend [M, N]."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    addend: Tensor


class InPanels:
    """A record whose frozen operands are kept in panels as well, see :func:`in_panels`."""

    kept: Any


class LowRankInPanels(InPanels, LowRank):
    kept: KeptOperands


class LowRankGradientInPanels(InPanels, LowRankGradient):
    kept: KeptOperands


class KronInPanels(InPanels, Kron):
    kept: Kept  # W


class KronGradientInPanels(InPanels, KronGradient):
    kept: Kept  # Wᵀ


_IN_PANELS = {
    LowRank: LowRankInPanels,
    LowRankGradient: LowRankGradientInPanels,
    Kron: KronInPanels,
    KronGradient: KronGradientInPanels,
}
Either = TypeVar("Either", LowRank, LowRankGradient)
Step = TypeVar("Step", LowRank, LowRankGradient, Kron, KronGradient)


def in_panels(p: Step, kept: KeptOperands | Kept) -> Step:
    """The same operands with what is kept of them; ``_replace`` gives a record without it."""
    record: Any = next(made for plain, made in _IN_PANELS.items() if isinstance(p, plain))(*p)
    record.kept = kept
    return record


def _with_kept(record: Callable[..., Step]) -> Callable[..., Step]:
    """``record``, taking behind its own operands None or what is kept of them in panels."""

    def build(*operands: Any) -> Step:
        *own, kept = operands
        p = record(*own)
        return p if kept is None else in_panels(p, kept)

    return build


low_rank, low_rank_gradient = _with_kept(LowRank), _with_kept(LowRankGradient)
kron, kron_gradient = _with_kept(Kron), _with_kept(KronGradient)


def is_core(p: LowRank | LowRankGradient) -> bool:
    """Whether the gate is a core or cores: [A, r] and [r, r] do not tell by themselves."""
    return p.gate.ndim == (2 if p.index is None else 3)


def as_wide_as_the_gate(p: Either) -> Either:
    """The same operands without the parts of the factors that do not count."""
    r = p.gate.shape[-1]
    return p._replace(up=p.up[:, :r], down=None if p.down is None else p.down[:r])


Operands = LowRank | LowRankGradient | Kron | KronGradient | LinearAdd
