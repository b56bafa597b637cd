"""What an adapter is without a module: names of tensors, and functions of tensors and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from .. import functional
from ..linalg import StartRunner
from ..linalg.exponents import in_range, times_two_to
from ..operands import Kept
from ..reference import accumulation_dtype
from .options import Options

State = dict[str, Tensor]  # an adapter's tensors by their names
Tensors = Mapping[str, Tensor]
Own = TypeVar("Own", bound=Options)


class Adapter(Generic[Own]):
    """One kind of adapter; it is used as it stands and no object of it is made.

    Whoever holds the tensors hands them in by name, those in ``operands`` at least, with W as
    [N, K]. ``strength`` is what the update is multiplied by: s times the strength in the options.
    """

    kind: ClassVar[str]
    operation: ClassVar[str]  # its Problem.op
    trainables: ClassVar[tuple[str, ...]]
    factors: ClassVar[tuple[str, ...]]  # frozen tensors that the start computes
    operands: ClassVar[tuple[str, ...]]  # the tensors that the update is computed from
    rebuilt_from: ClassVar[tuple[str, ...]] = ()  # small factors that give back the others
    kept_fp32: ClassVar[tuple[str, ...]] = ()  # factors in fp32 or wider, as trainables are
    options_type: ClassVar[type[Options]]

    # --- the start

    @classmethod
    def start(
        cls,
        weights: Tensors,
        options: Own,
        run: StartRunner,
        gradients: Mapping[str, Tensor | None] | None = None,
    ) -> dict[str, State]:
        """Trainables and factors for each W, computed by ``run`` as one batch.

        Trainables come in fp32 over half precision, else in the weight's dtype.

        Parameters
        ----------
        weights : dict of Tensor [N, K]
            By the names of their layers, which errors name.
        options : Options
        run : StartRunner
        gradients : dict of Tensor [N, K], optional
            Of the loss in each weight, where :meth:`needs_gradients`; other starts ignore them.

        Raises
        ------
        TypeError, ValueError
            For a weight or an option that gives no start, or one that would never train.
        """
        if options.scaling_of(1) == 0.0:
            raise ValueError("scaling or alpha must not be 0 at the start, which would never train")
        named = {f"{name}.weight": weight for name, weight in weights.items()}
        states = dict(zip(weights, cls._start(named, options, run), strict=True))
        for name, state in states.items():
            dtype = accumulation_dtype(weights[name].dtype)
            state |= {t: state[t].to(dtype) for t in cls.trainables}
            if not cls.can_train(state):
                raise ValueError(
                    f"{name}.weight must give factors that let a gradient through, got ones that "
                    "are zero: such a layer never trains; leave it out (adapt's skip=)"
                )
        return states

    @classmethod
    def needs_gradients(cls, options: Own) -> bool:
        """Whether the start factorises the gradients of the weights in place of the weights."""
        return False

    @classmethod
    def _start(cls, weights: State, options: Own, run: StartRunner) -> list[State]:
        """What :meth:`start` gives, in the order of ``weights``; errors name their keys."""
        raise NotImplementedError

    @classmethod
    def fresh(cls, factors: Tensors, options: Own) -> State:
        """What trains, as a start over these ``factors`` gives it."""
        raise NotImplementedError

    @classmethod
    def silent(cls, factors: Tensors, options: Own) -> State:
        """What trains where the update is zero."""
        raise NotImplementedError

    @classmethod
    def outline(cls, weight: Tensor, options: Own) -> State | None:
        """What a start over ``weight`` [N, K] gives, in shape and dtype, on the meta device.

        None where the rank follows from the numbers in the weight.
        """
        raise NotImplementedError

    @classmethod
    def can_train(cls, state: Tensors) -> bool:
        """Whether any gradient ever reaches what trains, from the start in ``state``."""
        raise NotImplementedError

    @classmethod
    def held_factors(cls, options: Own) -> tuple[str, ...]:
        """Those of :attr:`factors` that are kept with these options."""
        return cls.factors

    @classmethod
    def rebuildable(cls, options: Own) -> bool:
        """Whether the factors follow from the base's weight, so that a file can go without them."""
        return True

    @classmethod
    def rebuild(cls, weight: Tensor, options: Own, kept: Tensors) -> State:
        """The factors of a saved layer from its weight and the tensors in :attr:`rebuilt_from`.

        Raises
        ------
        ValueError
            If they cannot be the factors that were trained with.
        """
        with torch.random.fork_rng(devices=[]):  # the trainables' start is not of interest
            (state,) = cls._start({"weight": weight}, options, StartRunner())
        return {name: state[name] for name in cls.held_factors(options)}

    # --- the update

    @classmethod
    def rank(cls, tensors: Tensors) -> int:
        """r of the update: the last dimension of whatever trains."""
        return tensors[cls.trainables[0]].shape[-1]

    @classmethod
    def completed(cls, tensors: Tensors, weight: Tensor) -> State:
        """The operands with what follows from W [N, K] and is not kept.

        :meth:`fused` and :meth:`fused_by_row` go without it, the functions of tensors alone do not.
        """
        return dict(tensors)

    @classmethod
    def fuses(cls, options: Own) -> bool:
        """Whether :meth:`fused` computes the update that the options ask for."""
        return True

    @classmethod
    def fused(
        cls, x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Tensors, strength: float
    ) -> Tensor:
        """y [..., N] = x (W + ΔW)ᵀ + b by the fused operator, for x [..., K]."""
        raise NotImplementedError

    @classmethod
    def frozen_of(cls, options: Own, step: str) -> tuple[str, ...] | None:
        """Factors that the step multiplies by beside W, in order: a layer may keep them and W in
        the layout of their products. None where :meth:`fused_of_kept` has no use for that."""
        return None

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
        """:meth:`fused` by W and the factors of :meth:`frozen_of` in a layout that the layer keeps:
        ``kept(False)`` for the forward, ``kept(True)`` for the backward, or None. None where it is
        no gain."""
        raise NotImplementedError

    @classmethod
    def update(cls, x: Tensor, tensors: Tensors, options: Own, strength: float) -> Tensor:
        """x ΔWᵀ [..., N] alone in plain PyTorch: for another input than the base's."""
        raise NotImplementedError

    # Each row of a batch with trainables of its own: x [B, ..., K], ``own`` [A, ...] those of A
    # adapters, ``index`` [B] the adapter of each row.

    @classmethod
    def fused_by_row(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tensors: Tensors,
        own: Tensors,
        index: Tensor,
        options: Own,
        strength: float,
    ) -> Tensor:
        """:meth:`fused`, of which ``own`` takes the place of what trains in ``tensors``."""
        update = cls.update_by_row(x, tensors, own, index, options, strength)
        return functional.linear_add(x, weight, bias, update)

    @classmethod
    def update_by_row(
        cls,
        x: Tensor,
        tensors: Tensors,
        own: Tensors,
        index: Tensor,
        options: Own,
        strength: float,
    ) -> Tensor:
        """:meth:`update`, of which ``own`` takes the place of what trains in ``tensors``."""
        raise NotImplementedError

    @staticmethod
    def flat_rows(x: Tensor) -> Tensor:
        """x [B, ..., K] as [B, T, K]."""
        return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)

    @classmethod
    def delta(cls, tensors: Tensors, options: Own, strength: float) -> Tensor:
        """ΔW [N, K], in fp64 for fp64 tensors and otherwise in fp32."""
        raise NotImplementedError

    @classmethod
    def lora_factors(cls, tensors: Tensors, options: Own, strength: float) -> tuple[Tensor, Tensor]:
        """(A [r, K], B [N, r]) with ΔW = B A, in the dtype of :meth:`delta`.

        Raises
        ------
        TypeError
            If the update has no low-rank factorisation.
        """
        raise TypeError(f"{cls.__name__} has no LoRA factors: its update is not low-rank")

    @classmethod
    def energy(cls, weight: Tensor, tensors: Tensors, options: Own) -> float | None:
        """Share of ‖W‖² that the frozen basis spans; None where there is no such basis."""
        return None


AnyAdapter = type[Adapter[Any]]


def outlined(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor of an outline: no numbers."""
    return torch.empty(shape, dtype=dtype, device="meta")


def share_of_energy(part: Tensor, whole: Tensor) -> float | None:
    """‖part‖² / ‖whole‖², summed in fp64; None of a weight of zeros."""
    scaled, exponent = in_range("weight", whole.detach())
    energy = _energy(scaled)
    return _energy(times_two_to(-exponent, part.detach())) / energy if energy else None


def _energy(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2)
