"""What the three adapter layers share: the frozen base, the update, merging, dtypes, state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import Choice, Problem, choose
from ..functional import linear_add
from ..linalg import StartRunner
from ..linalg.checks import renamed_matrices
from ..ops.common import autocast_enabled
from ..reference import HALF
from . import base_weight, merging, offload, state_dict, switch
from .become import (
    adapted_class,
    become,
    blank,
    check_can_become,
    over,
    restore,
    shallow_copy,
    without_hooks_of_accelerate,
)
from .options import Options

State = dict[str, Tensor]


class AdapterLinear(nn.Module):
    """A frozen linear layer plus a trainable update ΔW [N, K]; use one of the three subclasses.

    In front of whatever class the layer had: the layer stays an ``nn.Linear`` if it was one. The
    base weight keeps its name, shape and dtype and is only ever replaced by :meth:`merge`.
    ``weight`` is [N, K], or [K, N] over a ``Conv1D``. Frozen factors are plain attributes and no
    buffers: nothing sends them between ranks at every step or averages them; the state dict has
    them.
    """

    kind: ClassVar[str]
    operation: ClassVar[str]  # its Problem.op
    over: ClassVar[type[nn.Module]]  # the class that the layer had before
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
        "_off",
        "_bias_dtype",
    )

    conv1d: ClassVar[bool] = False  # whether the weight is stored as [K, N]

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    _options: Options
    _strength: float  # s times the run-time strength: what the kernels multiply by
    _merge: merging.Merge | None
    _start: str | None  # quick digest of the weight that the factors came from; None: unknown
    _off: Tensor | None  # its number while some thread asks for the base's answer
    _bias_dtype: torch.dtype | None  # what a bias that trains is kept in over half precision

    # --- construction

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Of a class made over ``nn.Linear``, where ``cls`` is over nothing yet."""
        return super().__new__(cls if "over" in vars(cls) else adapted_class(cls, nn.Linear))

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        """As ``nn.Linear``, then adapted at once: a fresh base is rarely what one wants to freeze.

        Use :meth:`from_linear` for a pretrained layer.
        """
        base = nn.Linear(in_features, out_features, bias, device, dtype)
        opts = self.options_type(**options)
        matrices = self.start_matrices({"linear": base}, opts)
        (state,) = self.start_named(matrices, opts, StartRunner())
        vars(self).update(vars(base))
        self._take_up(opts, state)

    @classmethod
    def _from_linear(cls, linear: nn.Module, options: Options) -> Any:
        check_can_become(linear, cls)
        with base_weight.present(linear):
            matrices = cls.start_matrices({"linear": linear}, options)
            (state,) = cls.start_named(matrices, options, StartRunner())
        return cls.from_state(linear, options, state)

    @classmethod
    def start_matrices(cls, layers: dict[str, nn.Module], options: Any) -> dict[str, Tensor]:
        """What :meth:`start` factorises of each layer, [N, K]: its weight."""
        return {name: base_weight.matrix(layer) for name, layer in layers.items()}

    @classmethod
    def start_named(
        cls, weights: dict[str, Tensor], options: Options, run: StartRunner
    ) -> list[State]:
        """:meth:`start`, with errors that name the layer instead of a position in the list."""
        with renamed_matrices([f"{name}.weight" for name in weights]):
            states = cls.start(list(weights.values()), options, run)
        for name, state in zip(weights, states, strict=True):
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
    def from_state(cls, linear: nn.Module, options: Options, state: State) -> Any:
        """A new layer over the parameters of ``linear``, with the tensors of a start or a file."""
        if "forward" in vars(linear):
            raise TypeError(
                "linear must have the forward of its class, got one with a hook of accelerate: "
                "adapt the model that it is in"
            )
        return become(shallow_copy(linear), cls, options, state)

    @classmethod
    def start(cls, weights: Sequence[Tensor], options: Any, run: StartRunner) -> list[State]:
        """Factors and initial trainables for each W [N, K], computed by ``run`` as one batch."""
        raise NotImplementedError

    @classmethod
    def rebuild(cls, weight: Tensor, options: Any, compact: State) -> State:
        """The factors of a saved layer from its weight and the small tensors in ``compact``.

        Raises
        ------
        ValueError
            If they cannot be the factors that were trained with.
        """
        (state,) = cls.start([weight], options, StartRunner())
        return {name: state[name] for name in cls.factors}

    def _take_up(self, options: Options, state: State) -> None:
        """Freeze what is there and hold the adapter's tensors beside it."""
        with base_weight.present(self):
            self._start = base_weight.digest(self)
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)
        self._merge, self._off, self._bias_dtype, self._options = None, None, None, options
        self.take_state(state)

    @torch.no_grad()
    def take_state(self, state: State) -> None:
        """Take trainables and factors: into the parameters that are there, where shapes agree.

        An optimizer that holds them goes on with these.
        """
        dtype = torch.float32 if self.weight.dtype in HALF else self.weight.dtype
        for name in self.factors:
            vars(self)[name] = state[name]
        for name in self.trainables:
            have = self._parameters.get(name)
            if have is not None and have.shape == state[name].shape:
                have.copy_(state[name])
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
        if self._merge is not None and self.merged:
            raise ValueError(
                "scaling and strength of a merged layer are inside its weight: unmerge() first"
            )
        self._set_options(options)

    def _set_options(self, options: Options) -> None:
        self._options = options
        self._strength = options.scaling_of(self.rank) * options.strength

    @property
    def rank(self) -> int:
        """r of the update."""
        raise NotImplementedError

    @property
    def scaling(self) -> float:
        """s in front of the update; setting it changes the options, alpha among them."""
        return self._options.scaling_of(self.rank)

    @scaling.setter
    def scaling(self, value: float) -> None:
        self.options = self._options.with_scaling(value, self.rank)

    # --- the update

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

    def matrix(self) -> Tensor:
        """The frozen weight as W [N, K] (a view)."""
        return self.weight.t() if self.conv1d else self.weight

    def forward(self, input: Tensor) -> Tensor:
        """y [..., N] = x (W + ΔW)ᵀ + b for x [..., K]."""
        if self._merge is not None and merging.holds(self):
            return merging.forward(self, input)
        number = self._off  # read once: another thread may end its time meanwhile
        if number is not None:
            return switch.forward(self, number, input)
        if self.training and "_hf_hook" in self.__dict__:
            offload.check_narrow(self)
        return self._adapted(input)

    def _adapted(self, x: Tensor) -> Tensor:
        if self._strength == 0.0:
            return self.base_forward(x)
        bias = self.bias if self._bias_dtype is None else self._narrow_bias()
        if self._adds_update():
            # The base sees x, the adapter a dropped copy; one rounding still, so a small update
            # survives in half precision.
            update = self._update(F.dropout(x, self._options.dropout, self.training))
            return linear_add(x, self.matrix(), bias, update)
        return self._fused(x, bias)

    def base_forward(self, x: Tensor) -> Tensor:
        """What the layer would answer without its adapter, bit for bit."""
        if self._bias_dtype is not None:
            return F.linear(x, self.matrix(), self._narrow_bias())
        y: Tensor = type(self).over.forward(self, x)
        return y

    def _adds_update(self) -> bool:
        """Whether the update is computed apart instead of by the fused operator."""
        return self.training and self._options.dropout > 0.0

    # --- a bias that trains

    def keep_bias(self, dtype: torch.dtype) -> None:
        """Keep the bias in ``dtype`` where the layer is in half precision, now and when cast."""
        assert self.bias is not None
        self._bias_dtype = dtype
        if self.bias.dtype in HALF:
            self.bias.data = self.bias.data.to(dtype)

    def _narrow_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.to(self.weight.dtype)

    # --- merge

    @property
    def merged(self) -> bool:
        """Whether ``weight`` is the merged one, as :meth:`merge` made it."""
        return self._merge is not None and merging.holds(self)

    @property
    def base_weight(self) -> nn.Parameter:
        """The original weight, merged or not."""
        return self._merge.original if self._merge is not None and self.merged else self.weight

    @torch.no_grad()
    def merge(self) -> None:
        """Replace the weight by W + ΔW; the original is kept for :meth:`unmerge`.

        The layer then costs exactly a frozen linear, and its state dict is that of a plain one;
        memory holds both weights. A half-precision sum is rounded without bias, because to-nearest
        would drop an update that is small against W; the same layer always gives the same bits. No
        effect on a merged layer.

        Raises
        ------
        ValueError
            If the merged weight would not be finite; the layer is as it was.
        """
        merging.merge(self)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. No effect on a layer that is not merged."""
        merging.unmerge(self)

    def to_linear(self, merge: bool = True) -> nn.Module:
        """A plain layer of the kind that was adapted, with W + ΔW, or with W itself.

        With ``merge=False`` it shares this layer's original parameters: the adapter is taken off.
        """
        over(self)
        weight = merging.merged_parameter(self) if merge else self.base_weight
        other = without_hooks_of_accelerate(shallow_copy(self))
        plain = restore(cast(AdapterLinear, other))
        plain.weight = weight
        return plain

    # --- nn.Module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As ``nn.Module``, but trainables stay in fp32 when the weight becomes half precision."""
        own = [getattr(self, name) for name in (*self.trainables, *self.wide)]
        kept = {id(t): torch.float32 for tensor in own for t in (tensor, tensor.grad)}
        if self.bias is not None and self._bias_dtype is not None:
            kept |= {id(t): self._bias_dtype for t in (self.bias, self.bias.grad)}

        def convert(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if id(tensor) not in kept or out.dtype not in HALF:
                return out
            dtype = kept[id(tensor)]
            if tensor.is_meta or out.is_meta:
                return torch.empty_like(tensor, device=out.device, dtype=dtype)
            return tensor.to(out.device, dtype)

        with merging.converted(self, fn):
            super()._apply(convert, recurse)
            for name in self.factors:
                vars(self)[name] = convert(vars(self)[name])
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A merged layer's is that of a plain layer with the merged weight."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state_dict.save(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        with state_dict.loading(self, state, prefix, metadata, *rest) as fits:
            if fits:
                super()._load_from_state_dict(state, prefix, metadata, *rest)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the two classes it was made of: a made class cannot be found by its name."""
        reduced = super().__reduce_ex__(max(protocol, 2))
        before = vars(type(self)).get("over")
        if before is None:  # a class on top of ours knows how to be found
            return reduced
        return blank, (type(self).__mro__[1], before), reduced[2]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        merging.copied(self)

    def reset_parameters(self) -> None:
        """Never re-initialise a pretrained base (``nn.Linear`` would)."""

    def rebuildable(self) -> bool:
        """Whether the factors follow from the base's weight, so that a file can go without them."""
        return True

    def energy_kept(self) -> float | None:
        """Share of ‖W‖² that the frozen basis spans; None where there is no such basis."""
        return None

    def explain(self, tokens: int = 2048) -> Choice:
        """The backend that a forward over ``tokens`` tokens takes, and why."""
        if self.merged:
            return Choice("merged", "a plain linear layer with the update inside its weight")
        return choose(self.problem(tokens))

    def problem(self, tokens: int) -> Problem:
        """What a forward over ``tokens`` tokens asks the backends to do, in the present mode."""
        n, k, device, dtype = self.out_features, self.in_features, self.weight.device, self._dtype()
        if self._adds_update():
            return Problem("linear_add", device, dtype, tokens, n, k, n)
        return Problem(self.operation, device, dtype, tokens, n, k, self.rank)

    def _dtype(self) -> torch.dtype:
        """That of a call's operands: autocast recasts all but fp64."""
        dtype, device = self.weight.dtype, self.weight.device.type
        if dtype == torch.float64 or not autocast_enabled(device):
            return dtype
        return torch.get_autocast_dtype(device)

    def base_changed(self) -> bool:
        """Whether the weight is another than the one that the factors came from."""
        return merging.base_changed(self)

    def trained_parameters(self) -> int:
        """How many numbers the adapter trains."""
        return sum(getattr(self, name).numel() for name in self.trainables)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        base = super().extra_repr() or (
            f"in_features={self.in_features}, out_features={self.out_features}"
        )
        merged = ", merged" if self.merged else ""
        return (
            f"{base}, rank={self.rank}, scaling={self.scaling:g}, "
            f"trained={self.trained_parameters()}{merged}"
        )


def energy(tensor: Tensor) -> float:
    """The squared Frobenius norm, summed in fp64."""
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64) ** 2)
