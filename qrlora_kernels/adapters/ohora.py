"""OHoRA (Zhang et al., EMNLP 2025): W + s · (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ), where A and B train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import functional, linalg
from ..autocast import autocast_enabled, outside_autocast
from ..linalg.checks import check_choice
from ..linalg.exponents import rounded
from ..linalg.kron import Columns, Start
from ..operands import Kept
from ..reference import HALF, accumulation_dtype, kron_delta_ref
from .adapter import Adapter, State, Tensors, outlined
from .options import AlphaOptions

Product = Literal["kron", "materialised", "lora"]


@dataclass(frozen=True)
class OHoRAOptions(AlphaOptions):
    """Options of OHoRA; see :meth:`qrlora_kernels.OHoRALinear.from_linear`."""

    rank: int | None = None
    columns: Columns = "leading"
    start: Start = "qr"
    product: Product = "kron"
    fold: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("columns", self.columns, get_args(Columns))
        check_choice("start", self.start, get_args(Start))
        check_choice("product", self.product, get_args(Product))
        if self.fold and self.product != "kron":
            raise ValueError(f"fold needs product='kron', got {self.product!r}")
        if self.product == "lora" and self.start not in ("qr", "svd"):
            raise ValueError(f"product='lora' needs start 'qr' or 'svd', got {self.start!r}")


class OHoRA(Adapter[OHoRAOptions]):
    """a [N/r, r], b [K/r, r] and their start a0, b0; [N, r] and [K, r] with ``product="lora"``."""

    kind = "ohora"
    operation = "kron_linear"
    trainables = ("a", "b")
    factors = ("a0", "b0")
    operands = ("a", "b", "a0", "b0")
    kept_fp32 = ("a0", "b0")
    options_type = OHoRAOptions

    @classmethod
    def _start(cls, weights: State, options: OHoRAOptions, run: linalg.StartRunner) -> list[State]:
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
            factors = {"a0": a0, "b0": b0}
            states.append(factors | cls.fresh(factors, options))
        return states

    @classmethod
    def fresh(cls, factors: Tensors, options: OHoRAOptions) -> State:
        """A = A₀ and B = B₀: the layer is its base."""
        return {"a": factors["a0"].clone(), "b": factors["b0"].clone()}

    @classmethod
    def silent(cls, factors: Tensors, options: OHoRAOptions) -> State:
        return cls.fresh(factors, options)

    @classmethod
    def update_by_row(
        cls,
        x: Tensor,
        tensors: Tensors,
        own: Tensors,
        index: Tensor,
        options: OHoRAOptions,
        strength: float,
    ) -> Tensor:
        if options.product != "kron":
            raise ValueError(
                f"rows of their own adapters need OHoRA's product='kron', got {options.product!r}"
            )
        a, b = own["a"][index], own["b"][index]
        with outside_autocast(x.device.type):
            tokens = cls.flat_rows(x).to(accumulation_dtype(x.dtype))
            split = tokens.unflatten(-1, (a.shape[-1], -1))
            # Per batch, not per token: a product that broadcasts would copy A for every token.
            mixed = torch.einsum("bni,btij->btnj", a, torch.einsum("btik,bkj->btij", split, b))
            start = _apply_factors(tokens, tensors["a0"], tensors["b0"], options.product)
            update = (strength * (mixed.flatten(-2) - start)).to(x.dtype)
        return update.reshape(*x.shape[:-1], update.shape[-1])

    @classmethod
    def outline(cls, weight: Tensor, options: OHoRAOptions) -> State | None:
        rows, columns = weight.shape
        rank = linalg.high_rank(rows, columns) if options.rank is None else options.rank
        cut = 1 if options.product == "lora" else rank
        dtype = accumulation_dtype(weight.dtype)
        a, b = outlined(dtype, rows // cut, rank), outlined(dtype, columns // cut, rank)
        return {"a0": a, "b0": b, "a": a, "b": b}

    @classmethod
    def can_train(cls, state: Tensors) -> bool:
        """A's gradient goes through B and B's through A: one of them is enough."""
        return bool(state["a0"].any()) or bool(state["b0"].any())

    @classmethod
    def fuses(cls, options: OHoRAOptions) -> bool:
        return options.product == "kron"

    @classmethod
    def fused(
        cls, x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Tensors, strength: float
    ) -> Tensor:
        a, b, a0, b0 = tensors["a"], tensors["b"], tensors["a0"], tensors["b0"]
        return functional.kron_linear(x, weight, bias, a, b, a0, b0, strength)

    @classmethod
    def frozen_of(cls, options: OHoRAOptions, step: str) -> tuple[str, ...] | None:
        return () if options.product == "kron" and not options.fold else None

    @classmethod
    def fused_of_kept(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tensors: Tensors,
        strength: float,
        kept: Callable[[bool], tuple[Kept, ...] | None],
    ) -> Tensor | None:
        a, b, a0, b0 = tensors["a"], tensors["b"], tensors["a0"], tensors["b0"]
        return functional.kept_kron(x, weight, bias, a, b, a0, b0, strength, kept)

    @classmethod
    def update(cls, x: Tensor, tensors: Tensors, options: OHoRAOptions, strength: float) -> Tensor:
        a, b, a0, b0 = (tensors[name] for name in cls.operands)
        # In fp32 even under autocast: two products of nearly the same factors are subtracted.
        with outside_autocast(x.device.type):
            tokens = x.to(accumulation_dtype(x.dtype))
            if options.product == "materialised":
                return linear(tokens, kron_delta_ref(a, b, a0, b0, strength)).to(x.dtype)
            start = _apply_factors(tokens, a0, b0, options.product)
            return (strength * (_apply_factors(tokens, a, b, options.product) - start)).to(x.dtype)

    @classmethod
    def delta(cls, tensors: Tensors, options: OHoRAOptions, strength: float) -> Tensor:
        a, b, a0, b0 = (tensors[name] for name in cls.operands)
        if options.product != "lora":
            return kron_delta_ref(a, b, a0, b0, strength)
        dtype = accumulation_dtype(a.dtype)
        a, b, a0, b0 = (t.to(dtype) for t in (a, b, a0, b0))
        with outside_autocast(a.device.type):
            return strength * (a @ b.mT - a0 @ b0.mT)

    @classmethod
    def lora_factors(
        cls, tensors: Tensors, options: OHoRAOptions, strength: float
    ) -> tuple[Tensor, Tensor]:
        if options.product != "lora":
            return super().lora_factors(tensors, options, strength)
        # A Bᵀ − A₀ B₀ᵀ = [A, −A₀] [B, B₀]ᵀ has rank 2r.
        a = torch.cat([tensors["a"], -tensors["a0"]], dim=1)
        return torch.cat([tensors["b"], tensors["b0"]], dim=1).mT, strength * a

    # --- the start inside the weight

    @classmethod
    def fold(cls, weight: Tensor, a0: Tensor, b0: Tensor, strength: float) -> Tensor:
        """W − s A₀ ⊗ B₀ᵀ [N, K], which :meth:`fused_over` takes in place of W."""
        start = kron_delta_ref(a0, b0, scaling=strength)
        return (weight.to(start.dtype) - start).to(weight.dtype)

    @classmethod
    def folds(cls, weight: Tensor) -> bool:
        """Whether a call may take the fold: rounded to half precision it would bury an update."""
        return weight.dtype not in HALF and not autocast_enabled(weight.device.type)

    @classmethod
    def fused_over(
        cls, x: Tensor, folded: Tensor, bias: Tensor | None, tensors: Tensors, strength: float
    ) -> Tensor:
        """:meth:`fused` over the weight with the start folded in."""
        a, b = tensors["a"], tensors["b"]
        return functional.kron_linear(x, folded, bias, a, b, scaling=strength)


def _apply_factors(x: Tensor, a: Tensor, b: Tensor, product: str) -> Tensor:
    """x [..., K] by the factors."""
    if product == "lora":
        return x @ b @ a.mT
    tokens = x.reshape(*x.shape[:-1], a.shape[-1], b.shape[-2])
    return (a @ (tokens @ b)).flatten(-2)
