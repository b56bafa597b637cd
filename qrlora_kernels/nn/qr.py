"""QR-LoRA (Liang & Bharadwaj 2025, arXiv 2508.21810): W + s · Q_r diag(λ) R̃_r, only λ trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, linalg
from ..linalg.exponents import rounded
from ..reference import accumulation_dtype, qr_delta_ref
from . import base_weight
from .adapter import State, share_of_energy
from .layer import AdapterLinear
from .options import Options, one_of

DEFAULT_TAU = 0.5  # what the paper's main experiments ran


@dataclass(frozen=True)
class QROptions(Options):
    """Options of :class:`QRLinear`; see :meth:`QRLinear.from_linear`."""

    rank: int | None = None
    tau: float | None = None
    rank_rule: linalg.RankRule = "magnitude"
    max_rank: int | None = None
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("rank_rule", self.rank_rule, linalg.RANK_RULES)
        if self.rank is not None and self.tau is not None:
            raise ValueError(
                f"rank and tau exclude each other, got rank={self.rank} and tau={self.tau}"
            )

    def scaling_of(self, rank: int) -> float:
        return self.scaling

    def with_scaling(self: Any, scaling: float, rank: int) -> Any:
        return replace(self, scaling=scaling)


class QRLinear(AdapterLinear):
    """y = x (W + s · Q_r diag(λ) R̃_r)ᵀ + b with λ [r] trainable and everything else frozen.

    Attributes
    ----------
    lam : Parameter [r]
        Starts at zero, so the model starts unchanged.
    q : Tensor [N, r]
    r : Tensor [r, K]
        In the original column order; both in the weight's dtype.
    pivots : Tensor [r] of int64
        Columns of W in the order they were chosen; with W they determine q and r.
    diagonal : Tensor [r]
        |R_ii|, not increasing, in fp64.
    """

    kind = "qr"
    operation = "qr_linear"
    trainables = ("lam",)
    factors = ("q", "r", "pivots", "diagonal")
    compact = ("pivots", "diagonal")
    wide = ("diagonal",)
    options_type = QROptions

    lam: nn.Parameter
    q: Tensor
    r: Tensor
    pivots: Tensor
    diagonal: Tensor

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int | None = None,
        tau: float | None = None,
        rank_rule: linalg.RankRule = "magnitude",
        max_rank: int | None = None,
        scaling: float = 1.0,
        *,
        dropout: float = 0.0,
    ) -> QRLinear:
        """Adapt a linear layer; its weight is shared and frozen, not copied.

        Parameters
        ----------
        linear : nn.Linear or transformers Conv1D
        rank : int, optional
            A fixed r, at most min(N, K).
        tau : float, optional
            Choose r by ``rank_rule`` at this threshold in (0, 1). With neither rank nor tau, 0.5.
        rank_rule : "magnitude", "energy" or "abs_sum"
            Count of |R_ii| > τ|R_11| (section 4.1); the smallest r whose Σ R_ii² reaches τ of the
            whole (eq. 4); the same with |R_ii| (section 2.2).
        max_rank : int, optional
            Upper bound on the r that a rule chooses.
        scaling : float
            s in front of the update.
        dropout : float
            Probability of dropping an element of the adapter's input in training.

        Raises
        ------
        TypeError, ValueError
            For a layer that cannot be adapted or an option out of range; the message names it.
        """
        options = QROptions(
            dropout=dropout,
            rank=rank,
            tau=tau,
            rank_rule=rank_rule,
            max_rank=max_rank,
            scaling=scaling,
        )
        made: QRLinear = cls._from_linear(linear, options)
        return made

    @classmethod
    def _start_states(
        cls, weights: dict[str, Tensor], options: Any, run: linalg.StartRunner
    ) -> list[State]:
        tau = DEFAULT_TAU if options.rank is None and options.tau is None else options.tau
        results = run(
            linalg.pivoted_qr,
            weights,
            rank=options.rank,
            tau=tau,
            rank_rule=options.rank_rule,
            max_rank=options.max_rank,
        )
        return [
            {
                "q": result.q.to(weight.dtype),
                "r": rounded(name, "r", result.r, weight.dtype),
                "pivots": result.pivots,
                "diagonal": result.diagonal,
                "lam": result.diagonal.new_zeros(result.rank),
            }
            for (name, weight), result in zip(weights.items(), results, strict=True)
        ]

    @classmethod
    def rebuild(cls, weight: Tensor, options: Any, compact: State) -> State:
        result = linalg.rebuild_pivoted_qr(weight, compact["pivots"])
        stored = compact["diagonal"].to(result.diagonal)
        rounding = 1e-8 * float(result.diagonal[0])
        if not torch.allclose(result.diagonal, stored, rtol=1e-4, atol=rounding):
            raise ValueError("the stored pivots do not give the stored diagonal of R")
        return {name: getattr(result, name) for name in cls.factors}

    @classmethod
    def can_train(cls, state: State) -> bool:
        return bool(state["q"].any()) and bool(state["r"].any())

    @property
    def rank(self) -> int:
        return self.lam.shape[0]

    def _fused(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return functional.qr_linear(
            x, self.matrix(), bias, self.q, self.r, self.lam, self._strength
        )

    def _update(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(x, self.r)
        return nn.functional.linear((h * (self._strength * self.lam)).to(h.dtype), self.q)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        return qr_delta_ref(self.q, self.r, self.lam, self._strength)

    @torch.no_grad()
    def lora_factors(self) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(self.q.dtype)
        return self.r.to(dtype), self._strength * self.q.to(dtype) * self.lam.to(dtype)

    def energy_kept(self) -> float | None:
        """‖Q_r R̃_r‖² / ‖W‖², the share of the weight that the basis spans."""
        with base_weight.present(self):
            return share_of_energy(self.r, self.matrix())
