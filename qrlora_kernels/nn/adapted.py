"""What an adapted layer holds: a frozen weight, its adapter's tensors and options."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters import Options, State
from ..dispatch.problem import Choice, Problem
from ..linalg import StartRunner
from ..reference import accumulation_dtype
from . import asking, base_weight, layouts, merging, offload, quantised
from .derived import Derived
from .per_row import ByRow


class Adapted(nn.Module, ByRow):
    """The state of :class:`AdapterLinear`, and what follows from it without a call."""

    kind: ClassVar[str]
    operation: ClassVar[str]
    trainables: ClassVar[tuple[str, ...]]
    factors: ClassVar[tuple[str, ...]]
    # What an adapted layer keeps in its __dict__ beside its factors.
    state_names: ClassVar[tuple[str, ...]] = (
        "_options",
        "_strength",
        "_fuses",
        "_merge",
        "_start",
        "_starts",
        "_off",
        "_asked",
        "_bias_dtype",
        "_prepack",
        "_packed",
        "_quantised",
        "derived",
    )
    conv1d: ClassVar[bool] = False  # whether the weight is stored as [K, N]

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    derived: Derived  # from frozen tensors
    _options: Options
    _strength: float  # s times the run-time strength: what the kernels multiply by
    _fuses: bool  # whether the fused operator computes what the options ask for
    _merge: merging.Merge | None
    _start: str | None  # quick digest of the weight that the factors came from; None: unknown
    _starts: dict[torch.dtype, str | None]  # the same in each dtype that the weight was cast to
    _asked: bool  # whether in some thread rows have adapters of their own
    _off: Tensor | None  # its number while some thread asks for the base's answer
    _prepack: bool = False  # whether frozen tensors are kept as calls take them
    _packed: layouts.Directions | None = None  # and in which directions as kernels read them
    _quantised: bool = False  # whether the weight is kept in few bits by another library
    _bias_dtype: torch.dtype | None  # what a bias that trains is kept in over half precision

    @classmethod
    def start(
        cls, layers: dict[str, nn.Module], options: Options, run: StartRunner
    ) -> dict[str, State]:
        """Trainables and factors for each of ``layers``, named in errors, as one batch."""
        with base_weight.present(*layers.values()):
            weights = {name: base_weight.matrix(layer) for name, layer in layers.items()}
            gradients = None
            if cls.adapter.needs_gradients(options):
                gradients = {name: base_weight.gradient(layer) for name, layer in layers.items()}
            return cls.adapter.start(weights, options, run, gradients)

    def _take_up(self, options: Options, state: State) -> None:
        """Freeze what is there and hold the adapter's tensors beside it."""
        with base_weight.present(self):
            self._start, self._starts = base_weight.digest(self), {}
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)
        self._merge, self._off, self._bias_dtype, self._options = None, None, None, options
        self._asked, self._prepack, self._packed = False, False, None
        self._quantised = base_weight.is_quantised(self)
        self.derived = Derived()
        self.take_state(state)

    @torch.no_grad()
    def take_state(self, state: State) -> None:
        """Take trainables and factors: into the parameters that are there, where shapes agree.

        An optimizer that holds them goes on with these.
        """
        dtype = accumulation_dtype(base_weight.dtype_of(self))
        held = self.held_factors()
        for name in self.factors:
            vars(self).pop(name, None)
        vars(self).update({name: state[name] for name in held})
        for name in self.trainables:
            offload.settle(self, name)  # from a hook that was hung on the layer since
            have = self._parameters.get(name)
            if have is not None and have.shape == state[name].shape:
                have.copy_(base_weight.spread(state[name], have))
            else:
                self.register_parameter(name, nn.Parameter(state[name].to(dtype)))
        self._set_options(self._options)

    # --- options and strength: one state that forward, merge, files and state dicts read

    @property
    def options(self) -> Any:
        """What the adapter was built with, and its strength now."""
        return self._options

    @options.setter
    def options(self, options: Options) -> None:
        if self.merged:
            raise ValueError(
                "scaling and strength of a merged layer are inside its weight: unmerge() first"
            )
        if self.adapter.held_factors(options) != self.held_factors():
            raise ValueError(
                "options must be of the factors that the layer keeps, "
                f"{', '.join(self.held_factors())}, got {options}"
            )
        self._set_options(options)

    def _set_options(self, options: Options) -> None:
        self.derived.drop()  # which depends on the strength
        self._options = options
        self._strength = options.scaling_of(self.rank) * options.strength
        self._fuses = self.adapter.fuses(options)

    @property
    def scaling(self) -> float:
        """s in front of the update; setting it changes the options, alpha among them."""
        return self._options.scaling_of(self.rank)

    @scaling.setter
    def scaling(self, value: float) -> None:
        self.options = self._options.with_scaling(value, self.rank)

    def _adds_update(self) -> bool:
        """Whether the update is computed apart instead of by the fused operator."""
        return not self._fuses or (self.training and self._options.dropout > 0.0)

    # --- the weight

    def matrix(self) -> Tensor:
        """The frozen weight as W [N, K]: a view, or the dense one that a quantised stands for."""
        if self._quantised:
            return base_weight.matrix(self)
        return self.weight.t() if self.conv1d else self.weight

    @property
    def base_weight(self) -> nn.Parameter:
        """The original weight, merged or not."""
        return merging.original(self)

    @property
    def merged(self) -> bool:
        """Whether ``weight`` is the merged one: a plain linear layer's, until :meth:`unmerge`."""
        return self._merge is not None

    # --- the update

    def _tensors(self) -> State:
        """The adapter's operands by name."""
        raise NotImplementedError

    def whole_tensors(self) -> State:
        """The operands with data: brought in, gathered from all ranks, which must all call, and
        with what follows from the weight."""
        with base_weight.present(self):
            tensors = {name: base_weight.whole(t) for name, t in self._tensors().items()}
            if tensors.keys() == set(self.adapter.operands):
                return tensors
            weight = base_weight.whole(self.base_weight)
            return self.adapter.completed(tensors, base_weight.matrix(self, weight))

    @property
    def rank(self) -> int:
        """r of the update."""
        return self.adapter.rank(self._tensors())

    def trained_now(self) -> State:
        return {name: getattr(self, name) for name in self.trainables}

    def held_factors(self) -> tuple[str, ...]:
        """The names of the factors that the layer keeps."""
        return self.adapter.held_factors(self._options)

    def frozen_now(self) -> State:
        return {name: getattr(self, name) for name in self.held_factors()}

    def begin(self) -> State:
        return self.adapter.fresh(self.frozen_now(), self._options)

    def silent(self) -> State:
        return self.adapter.silent(self.frozen_now(), self._options)

    def check_by_row(self, name: str) -> None:
        if self.merged:
            raise ValueError(f"{name} must not be merged for rows of other adapters: unmerge first")

    def trained_parameters(self) -> int:
        """How many numbers the adapter trains."""
        return sum(getattr(self, name).numel() for name in self.trainables)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW [N, K] in fp64 for fp64 weights, otherwise in fp32; transposed against a Conv1D's."""
        return self.adapter.delta(self.whole_tensors(), self._options, self._strength)

    @torch.no_grad()
    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """(A [r, K], B [N, r]) with ΔW = B A, in the dtype of :meth:`delta_weight`.

        Raises
        ------
        TypeError
            If the update has no low-rank factorisation.
        """
        return self.adapter.lora_factors(self.whole_tensors(), self._options, self._strength)

    def began_from(self) -> tuple[Tensor, State, float]:
        weight: Tensor = self.base_weight
        if quantised.is_quantised(weight):
            weight = base_weight.matrix(self)
        return weight, self.frozen_now(), self._strength

    def base_changed(self) -> bool:
        """Whether the weight is another than the one that the factors came from."""
        return merging.base_changed(self)

    def energy_kept(self) -> float | None:
        """Share of ‖W‖² that the frozen basis spans; None where there is no such basis."""
        with base_weight.present(self):
            matrix, tensors = self.matrix(), self._tensors()
            if tensors.keys() != set(self.adapter.operands):
                matrix = base_weight.whole(matrix)  # of which the others are made
            return self.adapter.energy(matrix, tensors, self._options)

    # --- the backends

    def explain(self, tokens: int = 2048, step: str = "fwd") -> Choice:
        """The backend and recipe that a ``step`` ("fwd" or "bwd") over ``tokens`` tokens takes, and
        why."""
        return asking.explain(self, tokens, step)

    def problem(self, tokens: int, step: str = "fwd") -> Problem:
        """What a ``step`` over ``tokens`` tokens asks the backends to do, in the present mode."""
        return asking.problem(self, tokens, step)

    def steps(self) -> tuple[str, ...]:
        """The steps that backends are asked for, in the present mode."""
        return asking.steps(self)
