"""QR-LoRA as a layer, see :mod:`qrlora_kernels.adapters.qr`."""

from __future__ import annotations

from torch import Tensor, nn

from ..adapters import QR, QROptions, State
from ..adapters.qr import Sides
from ..linalg import RankRule
from .layer import AdapterLinear


class QRLinear(AdapterLinear):
    """y = x (W + s · Q_r diag(λ) R̃_r)ᵀ + b with λ [r] trainable and everything else frozen.

    Attributes
    ----------
    lam : Parameter [r]
        Starts at zero, so the model starts unchanged.
    q : Tensor [N, r]
    r : Tensor [r, K] or None
        In the original column order; both in the weight's dtype. None with ``factors="output"``.
    pivots : Tensor [r] of int64
        Columns of W in the order they were chosen; with W they determine q and r.
    diagonal : Tensor [r]
        |R_ii|, not increasing, in fp64.
    """

    adapter = QR
    kind, operation = QR.kind, QR.operation
    trainables, factors = QR.trainables, QR.factors

    lam: nn.Parameter
    q: Tensor
    r: Tensor | None = None
    pivots: Tensor
    diagonal: Tensor

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int | None = None,
        tau: float | None = None,
        rank_rule: RankRule = "magnitude",
        max_rank: int | None = None,
        scaling: float = 1.0,
        *,
        factors: Sides = "both",
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
        factors : "both" or "output"
            Keep q and r, or q alone, half the memory: r = qᵀ W, so that the adapter acts on the
            base product. For weights in fp32 and fp64 only, of which h is made before a rounding,
            and without dropout. Where W is changed the update follows it.
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
            factors=factors,
        )
        return cls._from_linear(linear, options)

    def _tensors(self) -> State:
        if self.r is None:
            return {"q": self.q, "lam": self.lam}
        return {"q": self.q, "r": self.r, "lam": self.lam}
