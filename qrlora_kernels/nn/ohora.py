"""OHoRA as a layer, see :mod:`qrlora_kernels.adapters.ohora`."""

from __future__ import annotations

from torch import Tensor, nn

from ..adapters import OHoRA, OHoRAOptions, State
from ..adapters.ohora import Product
from ..linalg.kron import Columns, Start
from . import base_weight, offload
from .layer import AdapterLinear


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

    adapter = OHoRA
    kind, operation = OHoRA.kind, OHoRA.operation
    trainables, factors = OHoRA.trainables, OHoRA.factors

    a: nn.Parameter
    b: nn.Parameter
    a0: Tensor
    b0: Tensor
    _options: OHoRAOptions

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
            precision would bury a small update, so under autocast the start is computed, and so it
            is in a compiled call.
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
        return cls._from_linear(linear, options)

    def _tensors(self) -> State:
        return {"a": self.a, "b": self.b, "a0": self.a0, "b0": self.b0}

    def _fused(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        folded = self.folded if self._options.fold else None
        if folded is None:
            return OHoRA.fused(x, matrix, bias, self._tensors(), self._strength)
        return OHoRA.fused_over(x, folded, bias, self._tensors(), self._strength)

    @property
    def folded(self) -> Tensor | None:
        """W − s A₀ ⊗ B₀ᵀ [N, K], kept from call to call; None where a call goes without it.

        That is without the option ``fold``, under autocast and a compiler, in a layer that is
        merged or whose weight is offloaded or sharded, and where a frozen tensor asks for a
        gradient.
        """
        weight = self._parameters.get("weight")  # none where it is computed anew at every call
        if not self._options.fold or weight is None or self._merge is not None:
            return None
        if not OHoRA.folds(weight) or offload.offloads(self):
            return None
        if self._state_dict_pre_hooks and base_weight.is_gathered(self):
            return None
        return self.derived.get("folded", self._fold, weight, self.a0, self.b0)

    def _fold(self, weight: Tensor, a0: Tensor, b0: Tensor) -> Tensor:
        return OHoRA.fold(weight.t() if self.conv1d else weight, a0, b0, self._strength)
