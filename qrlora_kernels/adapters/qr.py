"""QR-LoRA (Liang & Bharadwaj 2025, arXiv 2508.21810): W + s · Q_r diag(λ) R̃_r, only λ trains."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import functional, linalg
from ..autocast import outside_autocast
from ..linalg.checks import check_choice
from ..linalg.exponents import in_range, rounded
from ..reference import HALF, accumulation_dtype
from .adapter import State, Tensors, outlined, share_of_energy
from .low_rank import LowRank
from .options import Options

DEFAULT_TAU = 0.5  # what the paper's main experiments ran
Sides = Literal["both", "output"]


@dataclass(frozen=True)
class QROptions(Options):
    """Options of QR-LoRA; see :meth:`qrlora_kernels.QRLinear.from_linear`."""

    rank: int | None = None
    tau: float | None = None
    rank_rule: linalg.RankRule = "magnitude"
    max_rank: int | None = None
    scaling: float = 1.0
    factors: Sides = field(default="both", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rank_rule", self.rank_rule, linalg.RANK_RULES)
        check_choice("factors", self.factors, get_args(Sides))
        if self.factors == "output" and self.dropout:
            raise ValueError(
                "dropout must be 0 with factors='output', whose h is made of the base product of "
                f"the whole input, got {self.dropout}"
            )
        if self.rank is not None and self.tau is not None:
            raise ValueError(
                f"rank and tau exclude each other, got rank={self.rank} and tau={self.tau}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Without factors of "both", which releases that know nothing else mean as well."""
        values = super().to_dict()
        if self.factors == "both":
            del values["factors"]
        return values

    @property
    def form(self) -> str:
        return "two_sided" if self.factors == "both" else "output"

    def scaling_of(self, rank: int) -> float:
        return self.scaling

    def with_scaling(self: Any, scaling: float, rank: int) -> Any:
        return replace(self, scaling=scaling)


class QR(LowRank[QROptions]):
    """lam [r], q [N, r], r [r, K] in the original column order, pivots [r], diagonal [r].

    With factors of "output" there is no r: h is made of the base product, since r = qᵀ W.
    """

    kind = "qr"
    operation = "qr_linear"
    trainables = ("lam",)
    factors = ("q", "r", "pivots", "diagonal")
    operands = ("q", "r", "lam")
    up, down, gate = operands
    square = False
    function = staticmethod(functional.qr_linear)
    rebuilt_from = ("pivots", "diagonal")
    kept_fp32 = ("diagonal",)
    options_type = QROptions

    @classmethod
    def _start(cls, weights: State, options: QROptions, run: linalg.StartRunner) -> list[State]:
        if options.form == "output":
            _check_wide(weights)
        tau = DEFAULT_TAU if options.rank is None and options.tau is None else options.tau
        results = run(
            linalg.pivoted_qr,
            weights,
            rank=options.rank,
            tau=tau,
            rank_rule=options.rank_rule,
            max_rank=options.max_rank,
        )
        states = []
        for (name, weight), result in zip(weights.items(), results, strict=True):
            factors = {
                "q": result.q.to(weight.dtype),
                "r": rounded(name, "r", result.r, weight.dtype),
                "pivots": result.pivots,
                "diagonal": result.diagonal,
            }
            held = {key: factors[key] for key in cls.held_factors(options)}
            states.append(held | cls.fresh(held, options))
        return states

    @classmethod
    def fresh(cls, factors: Tensors, options: QROptions) -> State:
        """λ = 0: the layer is its base."""
        return {"lam": torch.zeros_like(factors["diagonal"])}

    @classmethod
    def can_train(cls, state: Tensors) -> bool:
        down = state.get("r", state["diagonal"])  # one is zero where the other is
        return bool(state["q"].any()) and bool(down.any())

    @classmethod
    def held_factors(cls, options: QROptions) -> tuple[str, ...]:
        if options.form == "output":
            return tuple(key for key in cls.factors if key != cls.down)
        return cls.factors

    @classmethod
    def completed(cls, tensors: Tensors, weight: Tensor) -> State:
        if cls.down in tensors:
            return dict(tensors)
        return {**tensors, cls.down: _other_side(tensors[cls.up], weight)}

    @classmethod
    def outline(cls, weight: Tensor, options: QROptions) -> State | None:
        if options.rank is None:
            return None
        (rows, columns), rank = weight.shape, options.rank
        factors = {
            "q": outlined(weight.dtype, rows, rank),
            "r": outlined(weight.dtype, rank, columns),
            "pivots": outlined(torch.int64, rank),
            "diagonal": outlined(torch.float64, rank),
        }
        held = {key: factors[key] for key in cls.held_factors(options)}
        return held | {"lam": outlined(accumulation_dtype(weight.dtype), rank)}

    @classmethod
    def rebuild(cls, weight: Tensor, options: QROptions, kept: Tensors) -> State:
        result = linalg.rebuild_pivoted_qr(weight, kept["pivots"])
        stored = kept["diagonal"].to(result.diagonal)
        rounding = 1e-8 * float(result.diagonal[0])
        if not torch.allclose(result.diagonal, stored, rtol=1e-4, atol=rounding):
            raise ValueError("the stored pivots do not give the stored diagonal of R")
        return {name: getattr(result, name) for name in cls.held_factors(options)}

    @classmethod
    def energy(cls, weight: Tensor, tensors: Tensors, options: QROptions) -> float | None:
        """‖Q_r R̃_r‖² / ‖W‖²: the columns of Q are orthonormal."""
        if "r" in tensors:
            return share_of_energy(tensors["r"], weight)
        scaled, _ = in_range("weight", weight.detach())  # which a product might leave
        return share_of_energy(_other_side(tensors["q"], scaled), scaled)


def _check_wide(weights: State) -> None:
    for name, weight in weights.items():
        if weight.dtype in HALF:
            raise ValueError(
                f"{name} must be float32 or float64 with factors='output', got {weight.dtype}, to "
                "which the base product would be rounded before h is made of it: take "
                "factors='both'"
            )


def _other_side(up: Tensor, weight: Tensor) -> Tensor:
    """R̃ = Qᵀ W [r, K], in fp32 or wider."""
    dtype = accumulation_dtype(weight.dtype)
    with outside_autocast(weight.device.type), torch.no_grad():
        return up.to(dtype).mT @ weight.to(dtype)
