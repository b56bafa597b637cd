"""OHoRA (Zhang et al., EMNLP 2025): W + s · (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ), where A and B train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .. import functional, linalg
from ..linalg.exponents import rounded
from ..linalg.kron import Columns, Start
from ..ops.common import autocast_enabled, outside_autocast
from ..reference import HALF, accumulation_dtype, kron_delta_ref
from . import base_weight
from .adapter import State
from .layer import AdapterLinear
from .options import AlphaOptions, Options, one_of

Product = Literal["kron", "materialised", "lora"]


@dataclass(frozen=True)
class OHoRAOptions(AlphaOptions):
    """Options of :class:`OHoRALinear`; see :meth:`OHoRALinear.from_linear`."""

    rank: int | None = None
    columns: Columns = "leading"
    start: Start = "qr"
    product: Product = "kron"
    fold: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("columns", self.columns, get_args(Columns))
        one_of("start", self.start, get_args(Start))
        one_of("product", self.product, get_args(Product))
        if self.fold and self.product != "kron":
            raise ValueError(f"fold needs product='kron', got {self.product!r}")
        if self.product == "lora" and self.start not in ("qr", "svd"):
            raise ValueError(f"product='lora' needs start 'qr' or 'svd', got {self.start!r}")


class OHoRALinear(AdapterLinear):
    """y = x (W + s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ))ᵀ + b with A and B trainable and everything else frozen.

    Attributes
    ----------
    a : Parameter [N/r, r]
    b : Parameter [K/r, r]
        Start at a0 and b0, so the model starts unchanged. With ``product="lora"`` they are
        [N, r] and [K, r].
    a0, b0 : Tensor
        The start, in the trainables' dtype.
    """

    kind = "ohora"
    operation = "kron_linear"
    trainables = ("a", "b")
    factors = ("a0", "b0")
    wide = ("a0", "b0")
    options_type = OHoRAOptions
    state_names = (*AdapterLinear.state_names, "folded")

    a: nn.Parameter
    b: nn.Parameter
    a0: Tensor
    b0: Tensor
    folded: Tensor | None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int | None = None,
        alpha: float | None = None,
        columns: Columns = "leading",
        *,
        start: Start = "qr",
        product: Product = "kron",
        fold: bool = False,
        seed: int = 0,
        dropout: float = 0.0,
    ) -> OHoRALinear:
        """Adapt a linear layer; its weight is shared and frozen, not copied.

        Parameters
        ----------
        linear : nn.Linear or transformers Conv1D
        rank : int, optional
            A common divisor r of N and K, at most both square roots. Without it the largest,
            r_high (section 3.2).
        alpha : float, optional
            s = alpha / r; without it s = 1.
        columns : "leading" or "selected"
            Which columns of R the start takes: the first r (eq. 8 and 9 to the letter), or those
            of the chosen indices, which keeps the rank.
        start : "qr", "svd", "random" or "kaiming"
            Factors of W chosen by |R_ii|, SVD in place of QR, random indices of the QR, or
            Kaiming-uniform factors.
        product : "kron", "materialised" or "lora"
            Apply the Kronecker product per token, or through the materialised N × K matrix (R-Kron,
            the reference), or multiply uncut factors as A Bᵀ (the paper's ablation).
        fold : bool
            Keep W − s A₀ ⊗ B₀ᵀ as a second, non-persistent copy of the weight and skip the start
            in every call. For fp32 and fp64 only: rounding that copy and the whole of A to half
            precision would bury a small update, so under autocast the start is computed.
        seed : int
            Of the random starts.
        dropout : float
            Probability of dropping an element of the adapter's input in training.

        Raises
        ------
        TypeError, ValueError
            For a layer that cannot be adapted or an option out of range; the message names it.
        """
        options = OHoRAOptions(
            dropout=dropout,
            rank=rank,
            alpha=alpha,
            columns=columns,
            start=start,
            product=product,
            fold=fold,
            seed=seed,
        )
        made: OHoRALinear = cls._from_linear(linear, options)
        return made

    @classmethod
    def _start_states(
        cls, weights: dict[str, Tensor], options: Any, run: linalg.StartRunner
    ) -> list[State]:
        for name, weight in weights.items():
            if options.fold and weight.dtype in HALF:
                raise ValueError(
                    f"fold needs float32 or float64 weights, got {weight.dtype} for {name}"
                )
        results = run(
            linalg.kron_factors,
            weights,
            rank=options.rank,
            columns=options.columns,
            start=options.start,
            seed=options.seed,
            cut=options.product != "lora",
            out_dtype=torch.float64,
        )
        states = []
        for (name, weight), (a0, b0) in zip(weights.items(), results, strict=True):
            dtype = accumulation_dtype(weight.dtype)  # fp32 over half precision
            a0 = rounded(name, "a0", a0, dtype)
            b0 = rounded(name, "b0", b0, dtype)
            states.append({"a0": a0, "b0": b0, "a": a0.clone(), "b": b0.clone()})
        return states

    @classmethod
    def can_train(cls, state: State) -> bool:
        """A's gradient goes through B and B's through A: one of them is enough."""
        return bool(state["a0"].any()) or bool(state["b0"].any())

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def _set_options(self, options: Options) -> None:
        super()._set_options(options)
        self._refold()

    def _fold(self) -> Tensor:
        start = kron_delta_ref(self.a0, self.b0, scaling=self._strength)
        with base_weight.present(self):
            weight = self.base_weight.detach().to(start.dtype)
        return ((weight.t() if self.conv1d else weight) - start).to(self.weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._refold()
        return self

    def _refold(self) -> None:
        """The fold follows weight, start and strength wherever they are converted or loaded."""
        self.folded = self._fold() if self.options.fold else None

    def _adds_update(self) -> bool:
        return self.options.product != "kron" or super()._adds_update()

    def _fused(self, x: Tensor, bias: Tensor | None) -> Tensor:
        a, b = self.a, self.b
        if self.folded is not None and not _computed_in_half(self.folded):
            return functional.kron_linear(x, self.folded, bias, a, b, scaling=self._strength)
        return functional.kron_linear(
            x, self.matrix(), bias, a, b, self.a0, self.b0, self._strength
        )

    def _update(self, x: Tensor) -> Tensor:
        # In fp32 even under autocast: two products of nearly the same factors are subtracted.
        with outside_autocast(x.device.type):
            tokens = x.to(accumulation_dtype(x.dtype))
            if self.options.product == "materialised":
                delta = kron_delta_ref(self.a, self.b, self.a0, self.b0, self._strength)
                return nn.functional.linear(tokens, delta).to(x.dtype)
            start = _apply_factors(tokens, self.a0, self.b0, self.options.product)
            update = _apply_factors(tokens, self.a, self.b, self.options.product) - start
            return (self._strength * update).to(x.dtype)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        if self.options.product == "lora":
            dtype = accumulation_dtype(self.a.dtype)
            a, b, a0, b0 = (t.to(dtype) for t in (self.a, self.b, self.a0, self.b0))
            return self._strength * (a @ b.mT - a0 @ b0.mT)
        return kron_delta_ref(self.a, self.b, self.a0, self.b0, self._strength)

    @torch.no_grad()
    def lora_factors(self) -> tuple[Tensor, Tensor]:
        if self.options.product != "lora":
            return super().lora_factors()
        # A Bᵀ − A₀ B₀ᵀ = [A, −A₀] [B, B₀]ᵀ has rank 2r.
        a = torch.cat([self.a, -self.a0], dim=1)
        return torch.cat([self.b, self.b0], dim=1).mT, self._strength * a


def _computed_in_half(weight: Tensor) -> bool:
    return weight.dtype in HALF or autocast_enabled(weight.device.type)


def _apply_factors(x: Tensor, a: Tensor, b: Tensor, product: str) -> Tensor:
    if product == "lora":
        return x @ b @ a.mT
    tokens = x.reshape(*x.shape[:-1], a.shape[1], b.shape[0])
    return (a @ (tokens @ b)).flatten(-2)
