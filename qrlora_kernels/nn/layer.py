"""What the three adapter layers share: forward, merging, dtypes, state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import Options, State
from ..functional import linear_add
from ..linalg import StartRunner
from ..reference import HALF
from . import (
    asking,
    base_weight,
    conversion,
    dequantising,
    merging,
    nested,
    offload,
    per_row,
    prepacked,
    state_dict,
    switch,
)
from .adapted import Adapted
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
from .derived import Derived

Own = TypeVar("Own", bound="AdapterLinear")


class AdapterLinear(Adapted):
    """A frozen linear layer plus a trainable update ΔW [N, K]; use one of the three subclasses.

    In front of whatever class the layer had: the layer stays an ``nn.Linear`` if it was one. The
    base weight keeps its name, shape and dtype and is only ever replaced by :meth:`merge`.
    ``weight`` is [N, K], or [K, N] over a ``Conv1D``. Frozen factors are plain attributes and no
    buffers: nothing sends them between ranks at every step or averages them; the state dict has
    them.
    """

    over: ClassVar[type[nn.Module]]  # the class that the layer had before

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
        opts = self.adapter.options_type(**options)
        state = self.start({"linear": base}, opts, StartRunner())["linear"]
        vars(self).update(vars(base))
        self._take_up(opts, state)

    @classmethod
    def _from_linear(cls: type[Own], linear: nn.Module, options: Options) -> Own:
        check_can_become(linear, cls)
        state = cls.start({"linear": linear}, options, StartRunner())["linear"]
        return cls.from_state(linear, options, state)

    @classmethod
    def from_state(cls: type[Own], linear: nn.Module, options: Options, state: State) -> Own:
        """A new layer over the parameters of ``linear``, with the tensors of a start or a file."""
        if "forward" in vars(linear):
            raise TypeError(
                "linear must have the forward of its class, got one with a hook of accelerate: "
                "adapt the model that it is in"
            )
        return become(shallow_copy(linear), cls, options, state)

    # --- forward

    def forward(self, input: Tensor) -> Tensor:
        """y [..., N] = x (W + ΔW)ᵀ + b for x [..., K]."""
        if type(input) is not Tensor and nested.is_jagged(input):
            if self._asked:
                per_row.refuse(self, per_row.NESTED)
            return nested.through(self.forward, input)
        if self._merge is not None:
            if self._asked:
                per_row.refuse(self, per_row.MERGED)
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
        weight = self._parameters.get("weight")
        if weight is None:
            weight = self.weight  # computed anew by a parametrisation
        elif weight.device != self.__dict__[self.factors[0]].device:
            conversion.follow_weight(self)
        if self._quantised:
            return dequantising.forward(self, x)
        if self._prepack and (y := prepacked.forward(self, x)) is not None:
            return y
        matrix = weight.t() if self.conv1d else weight
        bias = self.bias if self._bias_dtype is None else self._narrow_bias()
        if self._asked or self._adds_update():
            apart = self._apart(x, matrix, bias, self._tensors())
            if apart is not None:
                return apart
        return self._fused(x, matrix, bias)

    def _apart(
        self, x: Tensor, matrix: Tensor, bias: Tensor | None, tensors: State
    ) -> Tensor | None:
        """The answer where rows have adapters of their own or the update is computed apart."""
        if self._asked and (rows := per_row.rows_of(self, x)) is not None:
            return self._by_row(x, matrix, bias, tensors, rows)
        if not self._adds_update():
            return None
        # The base sees x, the adapter a dropped copy; one rounding still, so a small update
        # survives in half precision.
        dropped = F.dropout(x, self._options.dropout, self.training)
        update = self.adapter.update(dropped, tensors, self._options, self._strength)
        return linear_add(x, matrix, bias, update)

    def _by_row(
        self, x: Tensor, matrix: Tensor, bias: Tensor | None, tensors: State, rows: per_row.Rows
    ) -> Tensor:
        own = rows.own
        if self._quantised:
            own = dequantising.cast_operands(own, self.adapter, x.dtype)
        of_rows = tensors, own, rows.place, self._options, self._strength
        if self._adds_update():
            dropped = F.dropout(x, self._options.dropout, self.training)
            return linear_add(x, matrix, bias, self.adapter.update_by_row(dropped, *of_rows))
        return self.adapter.fused_by_row(x, matrix, bias, *of_rows)

    def _fused(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        return self.adapter.fused(x, matrix, bias, self._tensors(), self._strength)

    def base_forward(self, x: Tensor) -> Tensor:
        """What the layer would answer without its adapter, bit for bit.

        Over a quantised weight by the dense one, as with the adapter.
        """
        if self._quantised:
            return dequantising.base(self, x)
        if self._prepack and (kept := prepacked.base(self, x)) is not None:
            return kept
        if self._bias_dtype is not None or (self._merge is not None and self._merge.dequantised):
            return F.linear(x, self.matrix(), self._narrow_bias())
        y: Tensor = type(self).over.forward(self, x)
        return y

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

    @torch.no_grad()
    def merge(self, dequantize: bool | torch.dtype = False) -> None:
        """Replace the weight by W + ΔW; the original is kept for :meth:`unmerge`.

        The layer then costs exactly a frozen linear, and its state dict is that of a plain one;
        memory holds both weights. A half-precision sum is rounded without bias, because to-nearest
        would drop an update that is small against W; the same layer always gives the same bits. No
        effect on a merged layer.

        Parameters
        ----------
        dequantize : bool or torch.dtype
            Over a quantised weight, merge into the dense one that it stands for, in this dtype, or
            with True in that of the weight that was quantised (bitsandbytes' int8, which does not
            know it: fp32). Quantised again, a small update would be lost.

        Raises
        ------
        ValueError
            If the merged weight would not be finite, or the weight is quantised and ``dequantize``
            is not asked for; the layer is as it was.
        """
        merging.merge(self, dequantize)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. No effect on a layer that is not merged."""
        merging.unmerge(self)

    def to_linear(self, merge: bool = True, dequantize: bool | torch.dtype = False) -> nn.Module:
        """A plain layer of the kind that was adapted, with W + ΔW, or with W itself.

        With ``merge=False`` it shares this layer's original parameters: the adapter is taken off.
        With ``merge=True`` over a quantised weight it is an ``nn.Linear``, see :meth:`merge`.

        Raises
        ------
        ValueError
            As :meth:`merge`.
        """
        over(self)
        with base_weight.present(self):
            weight = merging.merged_parameter(self, dequantize) if merge else self.base_weight
            other = without_hooks_of_accelerate(shallow_copy(self))
        plain = restore(cast(AdapterLinear, other))
        base_weight.put(plain, weight)
        return plain

    # --- nn.Module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As ``nn.Module``, but trainables stay in fp32 when the weight becomes half precision."""
        self.derived.drop()  # before there are two of everything
        change = conversion.keeping_fp32(self, fn)
        with conversion.account_kept(self, fn):
            super()._apply(change, recurse)
            for name in self.held_factors():
                vars(self)[name] = change(vars(self)[name])
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A merged layer's is that of a plain layer with the merged weight."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state_dict.save(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        with state_dict.loading(self, state, prefix, metadata, *rest) as own:
            if own is not None:
                super()._load_from_state_dict(own, prefix, metadata, *rest)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in the layer's place."""
        if self.merged:
            return self.to_linear()
        raise TypeError(
            "an adapted layer cannot be compiled by torch.jit.script: merge it first, or use "
            "torch.jit.trace, torch.export or torch.compile"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the two classes it was made of: a made class cannot be found by its name."""
        reduced = super().__reduce_ex__(max(protocol, 2))
        before = vars(type(self)).get("over")
        if before is None:  # a class on top of ours knows how to be found
            return reduced
        return blank, (type(self).__mro__[1], before), reduced[2]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._off, self._asked = None, False  # no thread asks anything of the copy
        self.derived = Derived()  # a shallow copy has the original's
        merging.recover(self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module``, which comes here for every assignment of a parameter."""
        super().register_parameter(name, param)
        if name == "weight" and "_merge" in vars(self):
            merging.assigned(self, param)

    def reset_parameters(self) -> None:
        """Never re-initialise a pretrained base (``nn.Linear`` would)."""

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        return asking.shown(self, super().extra_repr())
