"""LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604): W + s · U_r Cᵀ Σ_r V_rᵀ, only C [r, r] trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import functional, linalg
from ..linalg.checks import check_choice, check_finite, check_rank_fits, largest_magnitude
from ..linalg.exponents import in_range, rounded, times_two_to
from ..linalg.svd import Which
from ..reference import accumulation_dtype
from .adapter import State, Tensors, outlined, share_of_energy
from .low_rank import LowRank
from .options import LARGEST, AlphaOptions

MAX_STD = LARGEST / 100  # no draw leaves fp32's range
Sigma = Literal["in", "out", "split", "none"]
Basis = Literal["svd", "random_svd", "random", "gradient"]


@dataclass(frozen=True)
class LoRAXSOptions(AlphaOptions):
    """Options of LoRA-XS; see :meth:`qrlora_kernels.LoRAXSLinear.from_linear`."""

    rank: int = 16
    vectors: Which = "top"
    sigma: Sigma = "in"
    basis: Basis = "svd"
    init_std: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("vectors", self.vectors, get_args(Which))
        check_choice("sigma", self.sigma, get_args(Sigma))
        check_choice("basis", self.basis, get_args(Basis))
        if not 0.0 <= self.init_std <= MAX_STD:
            raise ValueError(
                f"init_std must be at least 0 and at most {MAX_STD:.3g}, got {self.init_std}"
            )


class LoRAXS(LowRank[LoRAXSOptions]):
    """core [r, r], a [r, K] and b [N, r]."""

    kind = "lora_xs"
    operation = "lora_xs_linear"
    trainables = ("core",)
    factors = ("a", "b")
    operands = ("a", "b", "core")
    down, up, gate = operands
    square = True
    function = staticmethod(functional.lora_xs_linear)
    options_type = LoRAXSOptions

    @classmethod
    def needs_gradients(cls, options: LoRAXSOptions) -> bool:
        return options.basis == "gradient"

    @classmethod
    def start(
        cls,
        weights: Tensors,
        options: LoRAXSOptions,
        run: linalg.StartRunner,
        gradients: Mapping[str, Tensor | None] | None = None,
    ) -> dict[str, State]:
        if cls.needs_gradients(options):
            scaled = partial(_scaled_gradients, weights, gradients or {}, options.seed)
            weights = run.together(scaled)
        return super().start(weights, options, run)

    @classmethod
    def _start(cls, weights: State, options: LoRAXSOptions, run: linalg.StartRunner) -> list[State]:
        bases = _bases(weights, options, run)
        states: list[State] = []
        for (name, w), (a, b) in zip(weights.items(), bases, strict=True):
            a = rounded(name, "a", a, w.dtype)
            b = rounded(name, "b", b, w.dtype)
            states.append({"a": a.contiguous(), "b": b.contiguous()})
        cores = run.drawn(lambda: [cls.fresh(state, options)["core"] for state in states])
        return [state | {"core": core} for state, core in zip(states, cores, strict=True)]

    @classmethod
    def fresh(cls, factors: Tensors, options: LoRAXSOptions) -> State:
        """C of N(0, init_std²), drawn on the CPU by PyTorch's own generator."""
        rank = len(factors["a"])
        core = torch.randn(rank, rank, device="cpu").to(factors["a"].device)
        return {"core": core * options.init_std}

    @classmethod
    def outline(cls, weight: Tensor, options: LoRAXSOptions) -> State | None:
        (rows, columns), rank = weight.shape, options.rank
        return {
            "a": outlined(weight.dtype, rank, columns),
            "b": outlined(weight.dtype, rows, rank),
            "core": outlined(accumulation_dtype(weight.dtype), rank, rank),
        }

    @classmethod
    def rebuildable(cls, options: LoRAXSOptions) -> bool:
        return not cls.needs_gradients(options)

    @classmethod
    def energy(cls, weight: Tensor, tensors: Tensors, options: LoRAXSOptions) -> float | None:
        """Σ of the chosen σ_i² over ‖W‖², where the basis is W's and carries Σ."""
        if options.basis != "svd" or options.sigma not in ("in", "out"):
            return None
        return share_of_energy(tensors["a" if options.sigma == "in" else "b"], weight)


def _bases(
    weights: State, options: LoRAXSOptions, run: linalg.StartRunner
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


def _scaled_gradients(weights: Tensors, gradients: Mapping[str, Tensor | None], seed: int) -> State:
    """Each weight's gradient [N, K] in its dtype, scaled to the largest singular value of W.

    Σ is then as large as W's where it is largest: a gradient's falls much faster, and at W's
    Frobenius norm its first direction would outweigh what the others' learning rate is made for.
    """
    # Their size means nothing, and may be too small for a quotient.
    wide = {name: in_range(name, _gradient(name, gradients.get(name)))[0] for name in weights}
    both = {f"{name}.weight": weight for name, weight in weights.items()}
    both |= {f"{name}.weight.grad": gradient for name, gradient in wide.items()}
    tops = [found.s[0] for found in linalg.truncated_svd(both, 1, seed=seed)]
    return {
        name: (wide[name] * (of_weight / of_gradient)).to(weight.dtype)
        for (name, weight), of_weight, of_gradient in zip(
            weights.items(), tops[: len(wide)], tops[len(wide) :], strict=True
        )
    }


def _gradient(name: str, gradient: Tensor | None) -> Tensor:
    """The gradient of the weight of ``name`` [N, K], checked, in fp32 or wider."""
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
    return wide


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


def _random_factors(weights: State, rank: int, seed: int) -> list[Tensor]:
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
