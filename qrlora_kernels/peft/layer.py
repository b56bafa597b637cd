"""The layer that PEFT puts around a linear one: any number of adapters, some of them active."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from .. import adapters
from ..adapters import State
from ..autocast import autocast_enabled
from ..functional import linear_add
from ..nn import base_weight, dequantising, offload, per_row
from ..reference import HALF
from . import loading, merging, mixed
from .factors import Factors
from .held import AdaptedLayer

UNSUPPORTED = (
    "is not supported. Currently, only `torch.nn.Linear` (optionally quantized) and "
    "`transformers.pytorch_utils.Conv1D` are supported."
)


def check_supported(name: str, target: nn.Module) -> nn.Module:
    """The linear layer in ``target``, which may be wrapped by other adapters.

    Raises
    ------
    TypeError
        If there is none.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    linear_like = base_weight.plain_base(type(base)) is not None
    if not linear_like and resolve_quantization_backend(base) is None:
        raise TypeError(f"Target module {name} ({base_weight.full_name(type(base))}) {UNSUPPORTED}")
    return base


class _Linear(nn.Module, AdaptedLayer):
    """y = x (W + Σ ΔW)ᵀ + b over the active adapters; without them, what ``base_layer`` answers.

    Where the base is a plain linear layer that nobody listens to, base product and update are one
    fused call; else the base answers for itself and the update is added.
    """

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        base, again = self.get_base_layer(), kwargs.get("get_apply_tensor_subclass")
        self.quantization_backend = None
        if not base_weight.is_quantised(base):  # of a kind that is read here
            self.quantization_backend = resolve_quantization_backend(
                base, get_apply_tensor_subclass=again
            )
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.r, self.scaling, self.dropout, self.options, self.expected = {}, {}, {}, {}, {}
        setattr(self, f"{self.prefix}factors", Factors(self.adapter))
        setattr(self, f"{self.prefix}record", BufferDict(persistent=True))
        self.place = kwargs.get("place", "this layer")
        self.seen = loading.Seen()
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True
        self.merged_adapters = []
        self._merge = merging.Merge()
        self._active_adapter: list[str] = []
        self._asked = False

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with self._merge.following(self, fn):
            super()._apply(fn, recurse)
        return self

    def get_base_weight(self) -> Tensor:
        """The base's weight as it is stored, dequantised."""
        base = self.get_base_layer()
        if base_weight.is_quantised(base):
            return base_weight.matrix(base)
        weight: Tensor = BaseTunerLayer.get_base_weight(self)
        return weight

    # --- merge

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in the layout of the base's weight, in fp32 or wider."""
        self.compare(adapter)
        loading.require_own_base(self, adapter)
        tensors = {key: tensor.detach() for key, tensor in self.tensors(adapter).items()}
        with torch.no_grad():
            delta = self.adapter.delta(tensors, self.options[adapter], self.scaling[adapter])
        return delta.t() if base_weight.is_conv1d(self.get_base_layer()) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the updates into the base's weight; the original is kept for :meth:`unmerge`.

        Parameters
        ----------
        safe_merge : bool
            Refuse a weight that would not be finite, before anything changes.
        adapter_names : list of str, optional
            The active adapters if None; those that are not on this layer are passed over.
        """
        merging.merge(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit.

        Where others changed it meanwhile, such as adapters around this one that are merged as well,
        the updates are subtracted.
        """
        merging.unmerge(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    # --- forward

    def forward(
        self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """y [..., N] for x [..., K]; ``adapter_names`` name the adapter of each row."""
        if adapter_names is not None:
            mixed.check(self, x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            result = self.base(x, *args, **kwargs)
        elif adapter_names is not None:
            result = mixed.forward(self, x, adapter_names, *args, **kwargs)
        elif self.merged:
            if self._asked:
                per_row.refuse(self, per_row.MERGED)
            result = self.base(x, *args, **kwargs)
        else:
            names = [name for name in self.active_adapters if self.has(name)]
            rows = per_row.rows_of(self, x) if self._asked else None
            if rows is not None:
                return self._by_row(x, names[0], rows, *args, **kwargs)
            result = self._adapted(x, names, *args, **kwargs)
        return result

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        for name in names:
            self.compare(name)
        if not names:
            return self.base(x, *args, **kwargs)
        fused = not (args or kwargs) and self.is_plain(x)
        if fused and len(names) == 1 and not self._updates_apart(names[0]):
            (name,) = names
            return self.through(x, lambda x, w, b: self._fused(name, x, w, b))
        if fused:
            return self.through(
                x, lambda x, w, b: linear_add(x, w, b, self._sum_of_updates(x, names, x.dtype))
            )
        result = self.base_layer(x, *args, **kwargs)
        return result + self._sum_of_updates(x, names, result.dtype)

    def _by_row(
        self, x: Tensor, name: str, rows: per_row.Rows, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Each row with its own adapter over the factors of the one called ``name``."""
        self.compare(name)
        fused = not (args or kwargs) and self.is_plain(x)
        if fused and not self._updates_apart(name):
            return self.through(x, lambda x, w, b: self._fused_by_row(name, rows, x, w, b))
        of_rows = self.tensors(name), *rows, self.options[name], self.scaling[name]
        dropped = F.dropout(x, self.dropout[name], self.training)
        update = self.adapter.update_by_row(dropped, *of_rows)
        if fused:
            return self.through(x, lambda x, w, b: linear_add(x, w, b, update.to(x.dtype)))
        result = self.base_layer(x, *args, **kwargs)
        return result + update.to(result.dtype)

    def _fused(self, name: str, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        tensors = self._of_product(self.tensors(name, exact=False), x)
        return self.adapter.fused(x, matrix, bias, tensors, self.scaling[name])

    def _fused_by_row(
        self, name: str, rows: per_row.Rows, x: Tensor, matrix: Tensor, bias: Tensor | None
    ) -> Tensor:
        tensors = self._of_product(self.tensors(name, exact=False), x)
        own = self._of_product(rows.own, x)
        of_rows = tensors, own, rows.place, self.options[name], self.scaling[name]
        return self.adapter.fused_by_row(x, matrix, bias, *of_rows)

    def _of_product(self, tensors: State, x: Tensor) -> State:
        """Operands in the dtype of x over a quantised base, which may be another than a start's."""
        if not base_weight.is_quantised(self.get_base_layer()):
            return tensors
        return dequantising.cast_operands(tensors, self.adapter, x.dtype)

    def through(self, x: Tensor, product: dequantising.Product) -> Tensor:
        """``product`` of x, W [N, K] and b of a plain base."""
        base = self.get_base_layer()
        if base_weight.is_quantised(base):
            return dequantising.by_dense(base, x, product)
        return product(x, *self._base())

    def base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base answers alone.

        A quantised one by its dense weight, as with an adapter: bitsandbytes' own forward repacks
        its weight on some processors.
        """
        if not (args or kwargs) and base_weight.is_quantised(self.base_layer) and self.is_plain(x):
            return dequantising.by_dense(self.base_layer, x, F.linear)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    def _updates_apart(self, name: str) -> bool:
        drops = self.training and self.dropout[name] > 0.0
        return drops or not self.adapter.fuses(self.options[name])

    def _sum_of_updates(self, x: Tensor, names: list[str], dtype: torch.dtype) -> Tensor:
        total = self.update(x, names[0])
        for name in names[1:]:
            total = total + self.update(x, name)
        return total.to(dtype)

    def update(self, x: Tensor, name: str) -> Tensor:
        """x ΔWᵀ [..., N] of one adapter."""
        tensors = self.tensors(name)
        dtype = next(iter(tensors.values())).dtype
        if not (x.dtype in HALF and dtype == torch.float32):  # which updates take as it is
            x = self._cast_input_dtype(x, dtype)
        x = F.dropout(x, self.dropout[name], self.training)
        return self.adapter.update(x, tensors, self.options[name], self.scaling[name])

    def _base(self) -> tuple[Tensor, Tensor | None]:
        """W [N, K] and b of a plain base."""
        base = self.get_base_layer()
        weight: Tensor = base.weight
        return (weight.t() if base_weight.is_conv1d(base) else weight), base.bias

    def is_plain(self, x: Tensor) -> bool:
        """Whether the base's forward is the plain product, and nobody listens to it."""
        base = self.base_layer
        if not base_weight.computes_plainly(base) or offload.offloads(base):
            return False
        if base._forward_hooks or base._forward_pre_hooks:
            return False
        if base._backward_hooks or base._backward_pre_hooks:
            return False
        # FSDP takes the parameters out and sets views of its flat one as attributes.
        flat = type(vars(base).get("weight")) is Tensor
        held: dict[str, Any] = vars(base) if flat else base._parameters
        weight, bias = held.get("weight"), held.get("bias")
        if base_weight.is_quantised(base):
            return x.is_floating_point()
        if weight is None or not (flat or type(weight) is nn.Parameter):
            return False
        same = x.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype)
        return same or autocast_enabled(weight.device.type)

    def compare(self, name: str) -> None:
        """Refuse an adapter that was loaded over another base; see ``loading``."""
        loading.compare(self, name)

    def __repr__(self) -> str:
        return f"qrlora_kernels.peft.{super().__repr__()}"

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


class QRLoraLinear(_Linear):
    adapter = adapters.QR
    prefix = "qkdiag_"
    adapter_layer_names = ("qkdiag_lam",)


class LoraXSLinear(_Linear):
    adapter = adapters.LoRAXS
    prefix = "qkcore_"
    adapter_layer_names = ("qkcore_core",)


class OHoraLinear(_Linear):
    adapter = adapters.OHoRA
    prefix = "qkkron_"
    adapter_layer_names = ("qkkron_a", "qkkron_b")
