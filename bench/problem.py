"""One layer to adapt: tensors, the answer in fp64, and the parts that a variant must provide."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import DTYPES, Case

# The trainables of each family, under the names that its variants use.
TRAINABLES: dict[str, tuple[str, ...]] = {
    "": (),  # the frozen layer
    "qr": ("lam",),
    "lora_xs": ("core",),
    **dict.fromkeys(("ohora", "lokr", "lora"), ("a", "b")),
}
LORA_RANK = 8  # PEFT's default


class Unavailable(Exception):
    """A variant cannot run here; the message is the reason that the output gives."""


@dataclass
class Runner:
    """One built variant: a layer, and what trains in it.

    ``trainables`` maps the family's names to tensors (any names where nothing is gated);
    ``transposed`` lists those that the variant stores transposed; ``equal`` says that the family's
    numbers must come out. ``module`` is called inside
    ``context()``, and ``save`` writes the adapter as the variant's users do.
    """

    module: Callable[[Tensor], Tensor]
    trainables: dict[str, Tensor] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    save: Callable[[Path], object] | None = None
    operation: str = ""  # the operation of qrlora_kernels that runs, if one does
    rank: int | None = None
    equal: bool = True

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            return self.module(x)

    def gradients(self, y: Tensor, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        """dx and the gradient of each trainable, as the family names and shapes them."""
        found = torch.autograd.grad(y, [x, *self.trainables.values()], dy)
        named = dict(zip(["dx", *self.trainables], found, strict=True))
        return {key: g.mT if key in self.transposed else g for key, g in named.items()}


def training_step(runner: Runner, problem: LayerProblem) -> Callable[[], None]:
    """A forward and a backward, whose results are dropped."""

    def step() -> None:
        y = runner.forward(problem.x)
        runner.gradients(y, problem.x, problem.dy.to(y.dtype))

    return step


class LayerProblem:
    """Tensors of one case. Updates are a fraction of W, so that a wrong one cannot hide."""

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        self.case, self.device = case, torch.device(device)
        self.dtype = DTYPES[case.dtype]
        self._generator = torch.Generator().manual_seed(seed)
        n, k = case.n, case.k
        self.weight = self._draw(n, k, scale=k**-0.5)
        self.bias = self._draw(n, scale=0.1)
        self.x = self._draw(case.m, k).requires_grad_(True)
        self.dy = self._draw(case.m, n)

    def _draw(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(*shape, generator=self._generator) * scale
        return drawn.to(self.device, dtype or self.dtype)

    @property
    def trainable_dtype(self) -> torch.dtype:
        """fp32 over half-precision weights, else the weight's."""
        return torch.promote_types(self.dtype, torch.float32)

    def linear(self) -> nn.Linear:
        """A frozen layer on the problem's weight: where a copy lies in memory changes its speed."""
        layer = nn.Linear(self.case.k, self.case.n, device="meta", dtype=self.dtype)
        layer.weight, layer.bias = nn.Parameter(self.weight), nn.Parameter(self.bias)
        return layer.requires_grad_(False)

    def operands(self, adapter: str) -> dict[str, Tensor]:
        """The family's factors and trainables, new copies of the same numbers each time."""
        shared: dict[str, Tensor] = getattr(self, f"_{adapter}") if adapter else {}
        trained = TRAINABLES[adapter]
        return {
            key: value.clone().requires_grad_(True) if key in trained else value
            for key, value in shared.items()
        }

    @cached_property
    def _qr(self) -> dict[str, Tensor]:
        q, r = self._projection()
        return {"q": q, "r": r, "lam": self._draw(q.shape[1], dtype=self.trainable_dtype)}

    @cached_property
    def _lora_xs(self) -> dict[str, Tensor]:
        b, a = self._projection()
        rank = b.shape[1]
        core = self._draw(rank, rank, scale=rank**-0.5, dtype=self.trainable_dtype)
        return {"a": a, "b": b, "core": core}

    def _projection(self) -> tuple[Tensor, Tensor]:
        """(Q [N, r] orthonormal, QᵀW [r, K]): shaped and scaled as a real start, but free."""
        rank = min(self.case.r, self.case.n, self.case.k)
        wide = self.trainable_dtype
        q = torch.linalg.qr(self._draw(self.case.n, rank, dtype=wide)).Q
        return q.to(self.dtype), (q.mT @ self.weight.to(wide)).to(self.dtype)

    @cached_property
    def _ohora(self) -> dict[str, Tensor]:
        return {**self._lokr, "a0": self._kron("n"), "b0": self._kron("k")}

    @cached_property
    def _lokr(self) -> dict[str, Tensor]:
        return {"a": self._kron("n"), "b": self._kron("k")}

    @cached_property
    def _lora(self) -> dict[str, Tensor]:
        n, k, r = self.case.n, self.case.k, min(LORA_RANK, self.case.n, self.case.k)
        a = self._draw(r, k, scale=k**-0.5, dtype=self.trainable_dtype)
        return {"a": a, "b": self._draw(n, r, scale=r**-0.5, dtype=self.trainable_dtype)}

    def _kron(self, side: str) -> Tensor:
        r, size = self.case.kron_rank(), getattr(self.case, side)
        return self._draw(size // r, r, scale=self.case.k**-0.25, dtype=self.trainable_dtype)

    def expected(self, adapter: str) -> dict[str, Tensor]:
        """y, dx and the trainables' gradients in fp64, from the definition of ΔW and autograd."""
        given = {key: t.detach().double() for key, t in self.operands(adapter).items()}
        inputs = {"dx": self.x.detach().double(), **{t: given[t] for t in TRAINABLES[adapter]}}
        for tensor in inputs.values():
            tensor.requires_grad_(True)
        weight = self.weight.double()
        if adapter:
            weight = weight + _delta(adapter, given)
        y = F.linear(inputs["dx"], weight, self.bias.double())
        grads = torch.autograd.grad(y, list(inputs.values()), self.dy.double())
        return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


def _delta(adapter: str, t: dict[str, Tensor]) -> Tensor:
    if adapter == "qr":
        return t["q"] @ torch.diag(t["lam"]) @ t["r"]
    if adapter == "lora_xs":
        return t["b"] @ t["core"].mT @ t["a"]
    if adapter == "lora":
        return t["b"] @ t["a"]
    delta = torch.kron(t["a"], t["b"].mT.contiguous())
    return delta - torch.kron(t["a0"], t["b0"].mT.contiguous()) if adapter == "ohora" else delta
