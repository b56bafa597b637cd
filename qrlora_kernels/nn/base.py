"""What the three adapter layers share: the frozen base, merge and unmerge, dtypes, state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
from .frozen import check_base, frozen_matrix, is_conv1d
from .rounding import round_unbiased

State = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """What an adapter was built with; kept with the layer and written into the adapter file.

    ``dropout`` is the probability of dropping an element of the adapter's input during training;
    the base product sees the whole input, as in PEFT.
    """

    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")


def check_alpha(alpha: float | None) -> None:
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float))):
        raise TypeError(f"alpha must be a float, got {type(alpha).__name__}")


def energy(tensor: Tensor) -> float:
    """The squared Frobenius norm, summed in fp64."""
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64) ** 2)


class AdapterLinear(nn.Linear):
    """A frozen linear layer plus a trainable update ΔW [N, K]; use one of the three subclasses.

    The base weight is shared with the layer it came from, keeps its name, shape and dtype, and is
    only ever replaced by :meth:`merge`. ``weight`` is [N, K], or [K, N] over a ``Conv1D``.
    """

    kind: ClassVar[str]
    operation: ClassVar[str]  # its Problem.op
    trainables: ClassVar[tuple[str, ...]]
    factors: ClassVar[tuple[str, ...]]  # frozen buffers that the start computes
    compact: ClassVar[tuple[str, ...]] = ()  # factors that are small and give back the others
    wide: ClassVar[tuple[str, ...]] = ()  # factors that stay in fp32 or wider, as trainables do
    options_type: ClassVar[type[Options]]

    options: Options
    rank: int
    scaling: float
    conv1d: bool

    # --- construction

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
        (matrix,) = self.start_matrices({"linear": base}, opts).values()
        (state,) = self.start([matrix], opts, StartRunner())
        self._take_over(base, opts, state)

    @classmethod
    def _from_linear(cls, linear: nn.Module, options: Options) -> Any:
        check_base(linear)
        matrices = cls.start_matrices({"linear": linear}, options)
        (state,) = cls.start_named(matrices, options, StartRunner())
        return cls.from_state(linear, options, state)

    @classmethod
    def start_matrices(cls, layers: dict[str, nn.Module], options: Any) -> dict[str, Tensor]:
        """What :meth:`start` factorises of each layer, [N, K]: its weight."""
        return {name: frozen_matrix(layer) for name, layer in layers.items()}

    @classmethod
    def start_named(
        cls, weights: dict[str, Tensor], options: Options, run: StartRunner
    ) -> list[State]:
        """:meth:`start`, with errors that name the layer instead of a position in the list."""
        # What no start sees, as a strength, must agree too, or the ranks' models differ.
        run.require_agreement(facts={"adapter": cls.kind} | options.to_dict())
        with renamed_matrices([f"{name}.weight" for name in weights]):
            return cls.start(list(weights.values()), options, run)

    @classmethod
    def from_state(cls, linear: nn.Module, options: Options, state: State) -> Any:
        """Adapt ``linear`` with given tensors: the factors and trainables of a start or a file."""
        layer = cls.__new__(cls)
        layer._take_over(linear, options, state)
        return layer

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

    def _take_over(self, linear: nn.Module, options: Options, state: State) -> None:
        nn.Module.__init__(self)
        self.conv1d = is_conv1d(linear)
        self.weight = linear.weight  # type: ignore[assignment]
        self.register_parameter("bias", linear.bias)  # type: ignore[arg-type]
        self.out_features, self.in_features = frozen_matrix(linear).shape
        self.options = options
        self.training = linear.training
        self._unmerged: tuple[nn.Parameter, ...] = ()
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for name in self.factors:
            self.register_buffer(name, state[name])
        dtype = torch.float32 if self.weight.dtype in HALF else self.weight.dtype
        for name in self.trainables:
            self.register_parameter(name, nn.Parameter(state[name].to(dtype)))
        self._configure()

    def _configure(self) -> None:
        """Set ``rank`` and ``scaling`` from the options and the tensors just registered."""
        raise NotImplementedError

    # --- the update

    def _fused(self, x: Tensor) -> Tensor:
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

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] = x (W + ΔW)ᵀ + b for x [..., K]."""
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "a merged layer cannot train: its update is inside the weight; call unmerge()"
                )
            return F.linear(x, self.matrix(), self.bias)
        if self._adds_update():
            # The base sees x, the adapter a dropped copy; one rounding still, so a small update
            # survives in half precision.
            update = self._update(F.dropout(x, self.options.dropout, self.training))
            return linear_add(x, self.matrix(), self.bias, update)
        return self._fused(x)

    def _adds_update(self) -> bool:
        """Whether the update is computed apart instead of by the fused operator."""
        return self.training and self.options.dropout > 0.0

    # --- merge

    @property
    def merged(self) -> bool:
        return bool(self._unmerged)

    @property
    def base_weight(self) -> nn.Parameter:
        """The original weight, merged or not."""
        return self._unmerged[0] if self.merged else cast(nn.Parameter, self.weight)

    @torch.no_grad()
    def merge(self) -> None:
        """Replace the weight by W + ΔW; the original is kept for :meth:`unmerge`.

        The layer then costs exactly a frozen linear; memory holds both weights. A half-precision
        sum is rounded without bias, because to-nearest would drop an update that is small against
        W; the same layer always gives the same bits. No effect on a merged layer.
        """
        if self.merged:
            return
        kept = cast(nn.Parameter, self.weight)
        merged = nn.Parameter(self._merged_weight(), requires_grad=False)
        self.weight, self._unmerged = merged, (kept,)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. No effect on a layer that is not merged."""
        if self.merged:
            self.weight, self._unmerged = self._unmerged[0], ()

    def _merged_weight(self) -> Tensor:
        delta = self.delta_weight()
        weight = self.weight.to(delta.dtype) + (delta.t() if self.conv1d else delta)
        return round_unbiased(weight, self.weight.dtype).contiguous()

    @torch.no_grad()
    def to_linear(self, merge: bool = True) -> nn.Module:
        """A plain layer of the kind that was adapted, with W + ΔW, or with W itself.

        With ``merge=False`` it shares this layer's original parameters: the adapter is taken off.
        """
        weight = self.base_weight
        if merge:
            data = self.weight.clone() if self.merged else self._merged_weight()
            weight = nn.Parameter(data, requires_grad=False)
        linear = _empty_base(self)
        linear.weight, linear.bias = weight, self.bias
        return linear.train(self.training)

    # --- nn.Module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As ``nn.Module``, but trainables stay in fp32 when the weight becomes half precision."""
        own = [getattr(self, name) for name in (*self.trainables, *self.wide)]
        kept = {id(t) for tensor in own for t in (tensor, tensor.grad) if t is not None}

        def convert(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if id(tensor) not in kept or out.dtype not in HALF:
                return out
            if tensor.is_meta or out.is_meta:
                return torch.empty_like(tensor, device=out.device, dtype=torch.float32)
            return tensor.to(out.device, torch.float32)

        self._unmerged = tuple(_converted(weight, fn) for weight in self._unmerged)
        return super()._apply(convert, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A merged layer saves as if it were not: the update is in its trainables already."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for weight in self._unmerged:
            destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args)

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

    def trained_parameters(self) -> int:
        """How many numbers the adapter trains."""
        return sum(getattr(self, name).numel() for name in self.trainables)

    def extra_repr(self) -> str:
        merged = ", merged" if self.merged else ""
        return (
            f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}, "
            f"trained={self.trained_parameters()}{merged}"
        )


def _converted(weight: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """``fn`` of a parameter outside the module, in place where it can be: it may be tied."""
    data = fn(weight.data)
    if not torch._has_compatible_shallow_copy_type(weight.data, data):
        return nn.Parameter(data, requires_grad=weight.requires_grad)
    weight.data = data
    return weight


def _empty_base(layer: AdapterLinear) -> nn.Module:
    """A plain layer without data, of the kind that ``layer`` adapts."""
    if layer.conv1d:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            return Conv1D(layer.out_features, layer.in_features)
    return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
