"""What each of the three adapters says of itself: its tensors, its start, its update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..linalg import StartRunner
from ..linalg.exponents import in_range, times_two_to
from . import base_weight
from .options import Options

State = dict[str, Tensor]


class Adapter:
    """What a layer asks of its adapter; everything else is the same for all three."""

    kind: ClassVar[str]
    operation: ClassVar[str]  # its Problem.op
    trainables: ClassVar[tuple[str, ...]]
    factors: ClassVar[tuple[str, ...]]  # frozen tensors that the start computes
    compact: ClassVar[tuple[str, ...]] = ()  # factors that are small and give back the others
    wide: ClassVar[tuple[str, ...]] = ()  # factors that stay in fp32 or wider, as trainables do
    options_type: ClassVar[type[Options]]
    # What an adapted layer keeps in its __dict__ beside its factors.
    state_names: ClassVar[tuple[str, ...]] = (
        "_options",
        "_strength",
        "_merge",
        "_start",
        "_starts",
        "_off",
        "_bias_dtype",
    )

    @classmethod
    def start_matrices(cls, layers: dict[str, nn.Module], options: Any) -> dict[str, Tensor]:
        """What :meth:`start` factorises of each layer, [N, K]: its weight."""
        return {name: base_weight.matrix(layer) for name, layer in layers.items()}

    @classmethod
    def start(
        cls, weights: Mapping[str, Tensor], options: Options, run: StartRunner
    ) -> dict[str, State]:
        """Factors and initial trainables of each layer from its W [N, K], as one batch by ``run``.

        Raises
        ------
        TypeError, ValueError
            Name the layer: as the factorisations raise them, or it would never train.
        """
        if options.scaling_of(1) == 0.0:
            raise ValueError("scaling or alpha must not be 0 at the start, which would never train")
        named = {f"{name}.weight": weight for name, weight in weights.items()}
        states = dict(zip(weights, cls._start_states(named, options, run), strict=True))
        for name, state in states.items():
            if not cls.can_train(state):
                raise ValueError(
                    f"{name}.weight must give factors that let a gradient through, got ones that "
                    "are zero: such a layer never trains; leave it out (adapt's skip=)"
                )
        return states

    @classmethod
    def can_train(cls, state: State) -> bool:
        """Whether any gradient ever reaches what trains, from the start in ``state``."""
        return True

    @classmethod
    def _start_states(
        cls, weights: dict[str, Tensor], options: Any, run: StartRunner
    ) -> list[State]:
        """What :meth:`start` gives, in the order of ``weights``; errors name their keys."""
        raise NotImplementedError

    @classmethod
    def rebuild(cls, weight: Tensor, options: Any, compact: State) -> State:
        """The factors of a saved layer from its weight and the small tensors in ``compact``.

        Raises
        ------
        ValueError
            If they cannot be the factors that were trained with.
        """
        with torch.random.fork_rng(devices=[]):  # the trainables' start is not of interest
            (state,) = cls._start_states({"weight": weight}, options, StartRunner())
        return {name: state[name] for name in cls.factors}

    def rebuildable(self) -> bool:
        """Whether the factors follow from the base's weight, so that a file can go without them."""
        return True

    def energy_kept(self) -> float | None:
        """Share of ‖W‖² that the frozen basis spans; None where there is no such basis."""
        return None

    def trained_parameters(self) -> int:
        """How many numbers the adapter trains."""
        return sum(getattr(self, name).numel() for name in self.trainables)

    # --- the update

    @property
    def rank(self) -> int:
        """r of the update."""
        raise NotImplementedError

    def _fused(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [..., N] by the fused operator."""
        raise NotImplementedError

    def _update(self, x: Tensor) -> Tensor:
        """The update alone, x ΔWᵀ [..., N], in plain PyTorch: where dropout changes its input."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """ΔW [N, K] in fp64 for fp64 weights, otherwise in fp32; transposed against a Conv1D's."""
        raise NotImplementedError

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """(A [r, K], B [N, r]) with ΔW = B A, in the dtype of :meth:`delta_weight`.

        Raises
        ------
        TypeError
            If the update has no low-rank factorisation.
        """
        raise TypeError(f"{type(self).__name__} has no LoRA factors: its update is not low-rank")


def share_of_energy(part: Tensor, whole: Tensor) -> float | None:
    """‖part‖² / ‖whole‖², summed in fp64; None of a weight of zeros."""
    scaled, exponent = in_range("weight", whole.detach())
    energy = _energy(scaled)
    return _energy(times_two_to(-exponent, part.detach())) / energy if energy else None


def _energy(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2)
