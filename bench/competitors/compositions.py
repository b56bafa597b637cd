"""Adapted layers composed of library products by hand: which products, in which order.

Each takes its matrices in a layout of choice, see :mod:`bench.competitors.onednn`, and has forward
and backward of its own, so that what is saved and what is added where is up to it. ``up`` [N, r]
and ``down`` [r, K] are the factors, h = x downᵀ and g = dy up are [M, r].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .onednn import Layout


class Composition(ABC):
    """One order of products; what trains is handed to both steps."""

    @abstractmethod
    def forward(self, x: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        """y [M, N] of x [M, K], and what the backward needs."""

    @abstractmethod
    def backward(
        self, dy: Tensor, trained: tuple[Tensor, ...], kept: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """dx [M, K] of dy [M, N], and the gradient of each that trains."""

    def __call__(self, x: Tensor, *trained: Tensor) -> Tensor:
        y: Tensor = _Step.apply(x, self, *trained)
        return y


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, composition: Composition, *trained: Tensor) -> Tensor:
        y, *kept = composition.forward(x, *trained)
        ctx.composition, ctx.count = composition, len(trained)
        ctx.save_for_backward(*trained, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dx, *gradients = ctx.composition.backward(dy, saved[: ctx.count], saved[ctx.count :])
        return dx, None, *gradients


class Frozen(Composition):
    """The frozen layer W [N, K], b [N] alone; the compositions on top share its matrices."""

    def __init__(self, weight: Tensor, bias: Tensor, layout: Layout) -> None:
        self.weight, self.bias, self.layout = weight, bias, layout
        self.there, self.back = layout(weight), layout(weight.mT)

    def forward(self, x: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        return (self.there.product(x, bias=self.bias),)

    def backward(self, dy: Tensor, trained: Any, kept: Any) -> tuple[Tensor, ...]:
        return (self.back.product(dy),)


@dataclass(frozen=True)
class Gate:
    """What trains between the two factors of a family.

    ``through(h, t)`` [M, r] is what up multiplies, ``back(g, t)`` [M, r] what down does, and
    ``gradient(h, g)`` that of t.
    """

    through: Callable[[Tensor, Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


GATES = {
    "qr": Gate(
        lambda h, lam: h * lam.to(h.dtype),
        lambda g, lam: g * lam.to(g.dtype),
        lambda h, g: (h * g.to(torch.promote_types(g.dtype, torch.float32))).sum(0),
    ),
    "lora_xs": Gate(
        lambda h, core: h @ core.to(h.dtype),
        lambda g, core: g @ core.mT.to(g.dtype),
        lambda h, g: (h.mT @ g).to(torch.promote_types(g.dtype, torch.float32)),
    ),
}


class LowRank(Composition):
    """y = x Wᵀ + b + gate(x downᵀ) upᵀ; what it saves is h, and nothing of the size of x."""

    def __init__(self, base: Frozen, up: Tensor, down: Tensor, gate: Gate) -> None:
        self.base, self.gate = base, gate
        self.prepare(up, down)

    @abstractmethod
    def prepare(self, up: Tensor, down: Tensor) -> None:
        """Lay the frozen factors out."""

    @abstractmethod
    def adapted(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """(y, h), and what else :meth:`returned` needs."""

    @abstractmethod
    def returned(self, dy: Tensor, t: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(dx, g)."""

    def forward(self, x: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        (t,) = trained
        return self.adapted(x, t)

    def backward(
        self, dy: Tensor, trained: tuple[Tensor, ...], kept: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        (t,), (h, *others) = trained, kept
        dx, g = self.returned(dy, t, tuple(others))
        return dx, self.gate.gradient(h, g)


class _TwoSided(LowRank):
    """With each of the four skinny products by a matrix of its own."""

    def prepare(self, up: Tensor, down: Tensor) -> None:
        self.up, self.up_t, self.down, self.down_t = map(
            self.base.layout, (up, up.mT, down, down.mT)
        )


class UpdateFirst(_TwoSided):
    """The base's product accumulates onto the update."""

    def adapted(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        h = self.down.product(x)
        update = self.up.product(self.gate.through(h, t))
        return self.base.there.product(x, update, self.base.bias), h

    def returned(self, dy: Tensor, t: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        g = self.up_t.product(dy)
        update = self.down_t.product(self.gate.back(g, t))
        return self.base.back.product(dy, update), g


class BaseFirst(_TwoSided):
    """The skinny product accumulates onto the base's."""

    def adapted(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        h = self.down.product(x)
        y = self.base.there.product(x, bias=self.base.bias)
        return self.up.product(self.gate.through(h, t), y), h

    def returned(self, dy: Tensor, t: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        g = self.up_t.product(dy)
        return self.down_t.product(self.gate.back(g, t), self.base.back.product(dy)), g


class OutputSide(LowRank):
    """The adapter acts on the base's output alone, where down = upᵀ W."""

    def prepare(self, up: Tensor, down: Tensor) -> None:
        self.up, self.up_t = self.base.layout(up), self.base.layout(up.mT)

    def adapted(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        plain = self.base.there.product(x)
        h = self.up_t.product(plain)
        return self.up.product(self.gate.through(h, t), plain, self.base.bias), h

    def returned(self, dy: Tensor, t: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        g = self.up_t.product(dy)
        return self.base.back.product(self.up.product(self.gate.back(g, t), dy)), g


class EffectiveWeight(LowRank):
    """W + ΔW once a step takes the place of one skinny product in each direction."""

    def prepare(self, up: Tensor, down: Tensor) -> None:
        self.factor, lay = up, self.base.layout
        self.down, self.down_t, self.up_t = lay(down), lay(down.mT), lay(up.mT)

    def adapted(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        weight = self.down_t.product(self.gate.back(self.factor, t), self.base.weight)
        y = self.base.layout(weight).product(x, bias=self.base.bias)
        return y, self.down.product(x), weight

    def returned(self, dy: Tensor, t: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        (weight,) = kept
        return self.base.layout(weight.mT).product(dy), self.up_t.product(dy)


class Stacked(LowRank):
    """h rides along with the base's product, by [W; down], and g with that by [W, up]ᵀ."""

    def prepare(self, up: Tensor, down: Tensor) -> None:
        lay, weight = self.base.layout, self.base.weight
        self.up, self.down_t = lay(up), lay(down.mT)
        self.there = lay(torch.cat([weight, down]))
        self.back = lay(torch.cat([weight, up], 1).mT)

    def adapted(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        n = self.base.weight.shape[0]
        both = self.there.product(x)
        h = both[:, n:].contiguous()  # a view would keep all of it
        return self.up.product(self.gate.through(h, t), both[:, :n], self.base.bias), h

    def returned(self, dy: Tensor, t: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        k = self.base.weight.shape[1]
        both = self.back.product(dy)
        g = both[:, k:]
        return self.down_t.product(self.gate.back(g, t), both[:, :k]), g


class OneAccumulator(LowRank):
    """[x, gate(h)] · [W, up]ᵀ: base and update are one sum, which is rounded once."""

    def prepare(self, up: Tensor, down: Tensor) -> None:
        lay, weight = self.base.layout, self.base.weight
        self.down, self.up_t = lay(down), lay(up.mT)
        self.there = lay(torch.cat([weight, up], 1))
        self.back = lay(torch.cat([weight, down]).mT)

    def adapted(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        h = self.down.product(x)
        wide = torch.cat([x, self.gate.through(h, t)], 1)
        return self.there.product(wide, bias=self.base.bias), h

    def returned(self, dy: Tensor, t: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        g = self.up_t.product(dy)
        return self.back.product(torch.cat([dy, self.gate.back(g, t)], 1)), g


class Kron(Composition):
    """OHoRA's y = x Wᵀ + b + (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x, the update first."""

    def __init__(self, base: Frozen, a0: Tensor, b0: Tensor) -> None:
        self.base = base
        self.a0, self.b0 = (factor.to(base.weight.dtype) for factor in (a0, b0))

    def forward(self, x: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        a, b = (factor.to(x.dtype) for factor in trained)
        tokens = x.view(len(x), a.shape[1], b.shape[0])
        s = tokens @ b
        update = (a @ s - self.a0 @ (tokens @ self.b0)).flatten(1)
        return self.base.there.product(x, update, self.base.bias), x, s

    def backward(
        self, dy: Tensor, trained: tuple[Tensor, ...], kept: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        x, s = kept
        a, b = (factor.to(x.dtype) for factor in trained)
        rows = dy.view(len(dy), a.shape[0], a.shape[1])
        tokens = x.view(len(x), a.shape[1], b.shape[0])
        t = a.mT @ rows
        update = (t @ b.mT - (self.a0.mT @ rows) @ self.b0.mT).flatten(1)
        da = torch.tensordot(rows, s, dims=([0, 2], [0, 2]))
        db = torch.tensordot(tokens, t, dims=([0, 1], [0, 1]))
        wide = trained[0].dtype
        return self.base.back.product(dy, update), da.to(wide), db.to(wide)


class LoRA(Composition):
    """LoRA's y = x Wᵀ + b + (x aᵀ) bᵀ for a [r, K] and b [N, r] that train, the update first."""

    def __init__(self, base: Frozen) -> None:
        self.base = base

    def forward(self, x: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        a, b = (factor.to(x.dtype) for factor in trained)
        h = x @ a.mT
        return self.base.there.product(x, h @ b.mT, self.base.bias), x, h

    def backward(
        self, dy: Tensor, trained: tuple[Tensor, ...], kept: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        x, h = kept
        a, b = (factor.to(x.dtype) for factor in trained)
        g, wide = dy @ b, trained[0].dtype
        dx = self.base.back.product(dy, g @ a)
        return dx, (g.mT @ x).to(wide), (dy.mT @ h).to(wide)
