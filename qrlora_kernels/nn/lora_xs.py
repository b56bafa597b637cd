"""LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604): W + s · U_r Cᵀ Σ_r V_rᵀ, only C [r, r] trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from .. import functional, linalg
from ..linalg.checks import check_finite, check_rank_fits, largest_magnitude
from ..linalg.exponents import in_range, rounded, times_two_to
from ..linalg.svd import Which
from ..reference import accumulation_dtype, lora_xs_delta_ref
from . import base_weight
from .adapter import State, share_of_energy
from .layer import AdapterLinear
from .options import LARGEST, AlphaOptions, one_of

MAX_STD = LARGEST / 100  # no draw leaves fp32's range
Sigma = Literal["in", "out", "split", "none"]
Basis = Literal["svd", "random_svd", "random", "gradient"]


@dataclass(frozen=True)
class LoRAXSOptions(AlphaOptions):
    """Options of :class:`LoRAXSLinear`; see :meth:`LoRAXSLinear.from_linear`."""

    rank: int = 16
    vectors: Which = "top"
    sigma: Sigma = "in"
    basis: Basis = "svd"
    init_std: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("vectors", self.vectors, get_args(Which))
        one_of("sigma", self.sigma, get_args(Sigma))
        one_of("basis", self.basis, get_args(Basis))
        if not 0.0 <= self.init_std <= MAX_STD:
            raise ValueError(
                f"init_std must be at least 0 and at most {MAX_STD:.3g}, got {self.init_std}"
            )


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

    kind = "lora_xs"
    operation = "lora_xs_linear"
    trainables = ("core",)
    factors = ("a", "b")
    options_type = LoRAXSOptions

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
        made: LoRAXSLinear = cls._from_linear(linear, options)
        return made

    @classmethod
    def start_matrices(cls, layers: dict[str, nn.Module], options: Any) -> dict[str, Tensor]:
        weights = super().start_matrices(layers, options)
        if options.basis != "gradient":
            return weights
        return _scaled_gradients(layers, weights, options.seed)

    @classmethod
    def _start_states(
        cls, weights: dict[str, Tensor], options: Any, run: linalg.StartRunner
    ) -> list[State]:
        bases = _bases(weights, options, run)
        rank = options.rank
        cores = run.drawn(
            lambda: [
                torch.randn(rank, rank, device="cpu").to(w.device) * options.init_std
                for w in weights.values()
            ]
        )
        states = []
        for (name, w), (a, b), core in zip(weights.items(), bases, cores, strict=True):
            a = rounded(name, "a", a, w.dtype)
            b = rounded(name, "b", b, w.dtype)
            states.append({"a": a.contiguous(), "b": b.contiguous(), "core": core})
        return states

    @classmethod
    def can_train(cls, state: State) -> bool:
        return bool(state["a"].any()) and bool(state["b"].any())

    @property
    def rank(self) -> int:
        return self.core.shape[0]

    def _fused(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return functional.lora_xs_linear(
            x, self.matrix(), bias, self.a, self.b, self.core, self._strength
        )

    def _update(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(x, self.a)
        return nn.functional.linear(h @ (self._strength * self.core).to(h.dtype), self.b)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        return lora_xs_delta_ref(self.a, self.b, self.core, self._strength)

    @torch.no_grad()
    def lora_factors(self) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(self.a.dtype)
        b = self._strength * self.b.to(dtype) @ self.core.to(dtype).mT
        return self.a.to(dtype), b

    def rebuildable(self) -> bool:
        return self.options.basis != "gradient"

    def energy_kept(self) -> float | None:
        """Σ of the chosen σ_i² over ‖W‖², where the basis is W's and carries Σ."""
        if self.options.basis != "svd" or self.options.sigma not in ("in", "out"):
            return None
        carrier = self.a if self.options.sigma == "in" else self.b
        with base_weight.present(self):
            return share_of_energy(carrier, self.matrix())


def _bases(
    weights: dict[str, Tensor], options: LoRAXSOptions, run: linalg.StartRunner
) -> list[tuple[Tensor, Tensor]]:
    """(a, b) for each weight, with Σ on the side that the options ask for."""
    rank = options.rank
    if options.basis == "random":
        run.require_agreement(weights)  # no start does
        flat = run.drawn(lambda: _random_factors(weights, rank, options.seed))
        return list(zip(flat[::2], flat[1::2], strict=True))
    if options.basis == "random_svd":
        weights = {name: _random_like(name, w, options.seed) for name, w in weights.items()}
    results = run(
        linalg.truncated_svd,
        weights,
        rank=rank,
        which=options.vectors,
        seed=options.seed,
        out_dtype=torch.float64,
    )
    return [_place_sigma(u, s, vh, options.sigma) for u, s, vh in results]


def _scaled_gradients(
    layers: dict[str, nn.Module], weights: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Each weight's gradient [N, K] in its dtype, scaled to the largest singular value of W.

    Σ is then as large as W's where it is largest: a gradient's falls much faster, and at W's
    Frobenius norm its first direction would outweigh what the others' learning rate is made for.
    """
    # Their size means nothing, and may be too small for a quotient.
    gradients = {name: in_range(name, _gradient(name, layer))[0] for name, layer in layers.items()}
    both = {f"{name}.weight": weight for name, weight in weights.items()}
    both |= {f"{name}.weight.grad": gradient for name, gradient in gradients.items()}
    tops = [found.s[0] for found in linalg.truncated_svd(both, 1, seed=seed)]
    return {
        name: (gradients[name] * (of_weight / of_gradient)).to(weight.dtype)
        for (name, weight), of_weight, of_gradient in zip(
            weights.items(), tops[: len(weights)], tops[len(weights) :], strict=True
        )
    }


def _gradient(name: str, linear: nn.Module) -> Tensor:
    """``linear.weight.grad`` as [N, K], in fp32 or wider."""
    gradient: Tensor | None = cast(Tensor, linear.weight).grad
    if gradient is None:
        raise ValueError(
            f"basis 'gradient' needs the mean gradient of some batches in {name}.weight.grad (call "
            "requires_grad_ and backward before), got None"
        )
    wide = gradient.detach().to(accumulation_dtype(gradient.dtype))
    largest = largest_magnitude(wide)
    if not (math.isfinite(largest) and largest > 0.0):
        raise ValueError(
            f"basis 'gradient' needs a finite gradient other than zero in {name}.weight.grad, got "
            f"one of maximum norm {largest}"
        )
    return wide.t() if base_weight.is_conv1d(linear) else wide


def _place_sigma(u: Tensor, s: Tensor, vh: Tensor, side: str) -> tuple[Tensor, Tensor]:
    to_a = {"in": s, "out": torch.ones_like(s), "split": s.sqrt(), "none": torch.ones_like(s)}[side]
    to_b = {"in": torch.ones_like(s), "out": s, "split": s.sqrt(), "none": torch.ones_like(s)}[side]
    return to_a[:, None] * vh, u * to_b


def _random_like(name: str, weight: Tensor, seed: int) -> Tensor:
    scaled, exponent = in_range(name, weight.detach())
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(weight.shape, generator=generator, device="cpu").to(weight.device)
    like = draw * float(scaled.float().std())
    return times_two_to(exponent, like.double()) if exponent else like


def _random_factors(weights: dict[str, Tensor], rank: int, seed: int) -> list[Tensor]:
    """a and b of each weight, one after the other."""
    linalg.check_rank_options(rank, None, "magnitude", None)
    factors = []
    for name, weight in weights.items():
        check_rank_fits(name, rank, weight)
        check_finite(name, weight)
        n, k = weight.shape
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(rank, k, generator=generator, device="cpu") / k**0.5
        b = torch.randn(n, rank, generator=generator, device="cpu") / n**0.5
        factors += [a.to(weight.device), b.to(weight.device)]
    return factors
