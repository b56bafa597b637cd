"""LoRA-XS as a layer, see :mod:`qrlora_kernels.adapters.lora_xs`."""

from __future__ import annotations

from torch import Tensor, nn

from ..adapters import LoRAXS, LoRAXSOptions, State
from ..adapters.lora_xs import Basis, Sigma
from ..linalg.svd import Which
from .layer import AdapterLinear


class LoRAXSLinear(AdapterLinear):
    """y = x (W + s · B Cᵀ A)ᵀ + b with the core C [r, r] trainable and everything else frozen.

    Attributes
    ----------
    core : Parameter [r, r]
        Starts as N(0, init_std²), from PyTorch's global generator.
    a : Tensor [r, K]
        Σ_r V_rᵀ; the side of Σ is an option.
    b : Tensor [N, r]
        U_r; both in the weight's dtype.
    """

    adapter = LoRAXS
    kind, operation = LoRAXS.kind, LoRAXS.operation
    trainables, factors = LoRAXS.trainables, LoRAXS.factors

    core: nn.Parameter
    a: Tensor
    b: Tensor

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int = 16,
        alpha: float | None = None,
        *,
        vectors: Which = "top",
        sigma: Sigma = "in",
        basis: Basis = "svd",
        init_std: float = 1e-5,
        seed: int = 0,
        dropout: float = 0.0,
    ) -> LoRAXSLinear:
        """Adapt a linear layer; its weight is shared and frozen, not copied.

        Parameters
        ----------
        linear : nn.Linear or transformers Conv1D
        rank : int
            At most min(N, K).
        alpha : float, optional
            s = alpha / rank; without it s = 1.
        vectors : "top", "middle" or "bottom"
            Which singular vectors make the basis (the paper's ablation).
        sigma : "in", "out", "split" or "none"
            Σ_r on the input side (the paper), the output side, its root on both, or left out.
        basis : "svd", "random_svd", "random" or "gradient"
            The SVD of W, the SVD of a Gaussian matrix of W's shape and scale, Gaussian factors
            with columns of unit expected norm, or the SVD of ``linear.weight.grad`` (what backward
            left there before, on every rank the same) brought to W's largest singular value: the
            basis that holds most of the first step of full fine-tuning.
        init_std : float
            Standard deviation σ of the core's start.
        seed : int
            Of the randomised SVD and of the random bases.
        dropout : float
            Probability of dropping an element of the adapter's input in training.

        Raises
        ------
        TypeError, ValueError
            For a layer that cannot be adapted or an option out of range; the message names it.
        """
        options = LoRAXSOptions(
            dropout=dropout,
            rank=rank,
            alpha=alpha,
            vectors=vectors,
            sigma=sigma,
            basis=basis,
            init_std=init_std,
            seed=seed,
        )
        return cls._from_linear(linear, options)

    def _tensors(self) -> State:
        return {"a": self.a, "b": self.b, "core": self.core}
