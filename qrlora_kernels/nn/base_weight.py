"""The frozen weight under an adapter: which layers have one, and where it is.

The one place that tells kinds of layers and of weights apart: plain ones, Conv1D's, offloaded,
sharded and quantised ones. Other libraries are known by the names of their types.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..fingerprint import fingerprint, quick_digest
from . import offload, zero3
from . import quantised as few_bits
from .kinds import Quantised

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def plain_base(kind: type) -> type | None:
    """The class whose forward is the plain linear product among those that ``kind`` comes from.

    That is ``nn.Linear``, GPT-2's ``Conv1D``, which stores its weight as [K, N], or a layer of
    bitsandbytes.
    """
    for one in kind.__mro__:
        if (
            few_bits.is_layer(one)
            or one is nn.Linear
            or (one.__name__ == "Conv1D" and issubclass(one, nn.Module))
        ):
            # torch.nn.Conv1d is spelled otherwise.
            return one
    return None


def is_conv1d(module: nn.Module) -> bool:
    kind = plain_base(type(module))
    return kind is not None and not issubclass(kind, nn.Linear)


def is_linear_like(module: nn.Module) -> bool:
    return plain_base(type(module)) is not None


def full_name(kind: type) -> str:
    """As Python names it: several libraries have a class called ``Linear``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def check_base(linear: nn.Module, name: str = "linear") -> None:
    """Raise unless ``linear`` is a layer whose forward and weight an adapter can take over."""
    kind = plain_base(type(linear))
    if kind is None:
        raise TypeError(
            f"{name} must be an nn.Linear or a transformers Conv1D, got {full_name(type(linear))}"
        )
    if hasattr(linear, "parametrizations"):
        raise TypeError(f"{name} must have a plain weight, got a parametrised one")
    if isinstance(getattr(linear, "weight", None), nn.UninitializedParameter):
        raise TypeError(
            f"{name} must have a weight, got {full_name(type(linear))} before its first forward"
        )
    if not computes_plainly(linear):
        raise TypeError(
            f"{name} must compute a plain linear product, got {full_name(type(linear))} with a "
            "forward of its own (a quantised layer of an unknown kind, an adapter, a wrapper, or a "
            "prepacked layer: adapt first, or qk.prepack(model, False))"
        )
    if is_sharded(linear):
        raise TypeError(
            f"{name} must not be sharded yet, got {full_name(type(linear))}: adapt the model "
            "before fully_shard"
        )
    if is_quantised(linear):
        check_quantised(linear, f"{name}.weight")
    elif not is_elsewhere(linear):
        check_weight(linear.weight, f"{name}.weight")


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on the module itself."""
    return any(one.__name__ == "FSDPModule" for one in type(module).__mro__)


def computes_plainly(linear: nn.Module) -> bool:
    """Whether the forward of ``linear`` is that of the plain layer that it comes from."""
    kind: Any = plain_base(type(linear))
    # FSDPModule goes in front of the class: its forward is the layer's own.
    plain = kind is not None and type(linear).forward is kind.forward
    return plain and _calls_its_class(linear)


def _calls_its_class(linear: nn.Module) -> bool:
    """Whether a forward set on the object itself, if there is one, ends in its class's."""
    own = vars(linear).get("_old_forward", vars(linear).get("forward"))
    if own is None:
        return True
    if "_old_forward" in vars(linear) and not offload.hooked(linear):
        return False
    return (
        isinstance(own, MethodType)
        and own.__self__ is linear
        and own.__func__ is type(linear).forward
    )


def check_weight(weight: object, name: str) -> None:
    """Raise unless ``weight`` is a dense floating-point matrix with data."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if not isinstance(weight, nn.Parameter):
        raise TypeError(
            f"{name} must be a parameter, got a plain tensor (weight_norm, spectral_norm and "
            "pruning recompute it before every forward)"
        )
    if type(weight.data) is not Tensor:
        raise TypeError(
            f"{name} must be an ordinary tensor, got {type(weight.data).__name__} (distributed "
            "weights and quantised ones of this kind are not supported; adapt the model before "
            "fully_shard)"
        )
    if weight.is_meta:
        raise ValueError(f"{name} must hold data, got a tensor on the meta device")
    if weight.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {weight.dtype} (of "
            "quantised weights those of bitsandbytes and torchao are supported)"
        )
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{name} must be a matrix with elements, got shape {list(weight.shape)}")


def matrix(linear: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The base's weight as W [N, K], merged or not: for Conv1D a transposed view, never a copy.

    Of a quantised one the dense weight that it stands for. ``weight``: another one that the layer
    stores or has stored, in the place of its base's.
    """
    if weight is None:
        weight = cast(Tensor, getattr(linear, "base_weight", linear.weight))
    found = few_bits.quantised(weight, linear)
    if found is not None:
        with torch.no_grad():
            return found.dense(found.dtype)
    weight = weight.detach()
    return weight.t() if is_conv1d(linear) else weight


def gradient(linear: nn.Module) -> Tensor | None:
    """The gradient in the layer's weight as [N, K], if there is one."""
    found = cast(Tensor, linear.weight).grad
    return found.t() if found is not None and is_conv1d(linear) else found


@contextmanager
def present(*layers: nn.Module) -> Iterator[None]:
    """Inside, the weights of ``layers`` hold data, also of those that are offloaded or spread."""
    own = (p for layer in layers for p in layer._parameters.values())
    with offload.brought_in(layers), zero3.gathered(own):
        yield


def is_elsewhere(layer: nn.Module) -> bool:
    """Whether the layer's weight comes in for each forward alone: offloaded, or in ZeRO-3."""
    return offload.is_away(layer) or zero3.is_spread(layer.weight)


def replace_weight(layer: nn.Module, weight: nn.Parameter) -> None:
    """Let ``weight`` be the layer's, here or where its weight is kept while it is away."""
    layer.weight = weight
    offload.keep(layer, "weight", weight)


def put(layer: nn.Module, weight: nn.Parameter) -> None:
    """Let ``weight`` be the plain layer's: an ``nn.Linear`` from then on, if it was quantised and
    ``weight`` is dense."""
    was = is_quantised(layer)
    replace_weight(layer, weight)
    if was and not is_quantised(layer):
        few_bits.make_plain(layer)
        offload.rebind(layer)


def is_part(tensor: Tensor) -> bool:
    """Whether this rank holds a part of ``tensor`` alone: by ``fully_shard`` or ZeRO-3."""
    return hasattr(tensor, "full_tensor") or zero3.is_spread(tensor)


def whole(tensor: Tensor) -> Tensor:
    """``tensor``, gathered from all ranks where it is spread over them: all of them must call."""
    if zero3.is_spread(tensor):
        with zero3.gathered([cast(nn.Parameter, tensor)]):
            return tensor.detach().clone()
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def spread(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which every rank has whole, as ``like`` lies: whole, or this rank's part of it."""
    if not hasattr(like, "full_tensor") or hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)


def reshard(root: nn.Module) -> None:
    """Let each rank hold its parts alone again.

    After a forward without a backward ``fully_shard`` leaves whole parameters in the modules: what
    is written to them is lost, and who hands one to NumPy stops it from freeing their memory.
    """
    for module in root.modules():
        if is_sharded(module):
            cast(Any, module).reshard()


def is_gathered(layer: nn.Module) -> bool:
    """Whether ``fully_shard`` gathers the layer's weight for each forward.

    It fills the same memory anew and PyTorch counts no write, so that nothing computed from it can
    be kept. Of the layers whose parameters it manages it tells by a hook on each, from the first
    forward on.
    """
    hooks = layer._state_dict_pre_hooks
    return bool(hooks) and any(
        getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")
        for hook in hooks.values()
    )


def digest(layer: nn.Module, weight: Tensor | None = None) -> str:
    """The quick digest of the layer's stored weight, which must be present, or of ``weight``."""
    weight = cast(Tensor, layer.weight) if weight is None else weight
    found = few_bits.quantised(weight, layer)
    return quick_digest(whole(weight)) if found is None else found.digest()


def exact_digest(layer: nn.Module, weight: Tensor) -> str:
    """The fingerprint of ``weight`` as ``layer`` stores it: of the few bits, if quantised."""
    found = few_bits.quantised(weight, layer)
    return fingerprint(weight) if found is None else found.fingerprint()


# --- quantised weights


def is_quantised(layer: nn.Module) -> bool:
    return few_bits.is_quantised(layer._parameters.get("weight"))


def quantised(layer: nn.Module) -> Quantised:
    """The quantised weight of ``layer``, which has one."""
    weight = layer._parameters["weight"]
    found = few_bits.quantised(weight, layer)
    if found is None:
        raise TypeError(
            "weight must be the quantised one that the layer was adapted over, got a "
            f"{type(weight).__name__} that has lost what its library keeps beside it (torch.export "
            "and fully_shard do so to bitsandbytes' layers, and are for dense bases alone)"
        )
    return found


def recovered(weight: nn.Parameter) -> nn.Parameter:
    """A weight that was quantised, with the class that a pickle has lost, if it has."""
    return weight if few_bits.is_quantised(weight) else few_bits.recovered(weight)


def takes_any_bias(kind: type) -> bool:
    """Whether layers of this class cast their bias themselves, as those of bitsandbytes do."""
    return few_bits.is_layer(plain_base(kind) or kind)


def check_quantised(layer: nn.Module, name: str) -> None:
    """Raise unless the layer's weight, which is quantised, stands for a dense one."""
    found = quantised(layer)
    if offload.offloads(layer):
        raise TypeError(f"{name} must not be quantised and offloaded, got {found.kind}")
    if layer._parameters["weight"].is_meta:  # type: ignore[union-attr]
        raise ValueError(f"{name} must hold data, got a tensor on the meta device")
    if why := found.unready():
        raise ValueError(f"{name} must be a quantised weight that an adapter can read, got {why}")


def dtype_of(layer: nn.Module, weight: Tensor | None = None) -> torch.dtype:
    """The dtype of the matrix that the layer's weight is or stands for."""
    weight = cast(Tensor, layer.weight) if weight is None else weight
    found = few_bits.quantised(weight, layer)
    return weight.dtype if found is None else found.dtype


def features(kind: type) -> dict[str, Any]:
    """What a class made over ``kind`` needs beside it to tell N and K as ``nn.Linear`` does."""
    if issubclass(kind, nn.Linear):
        return {}
    return {
        "conv1d": True,
        "in_features": property(lambda self: self.nx),
        "out_features": property(lambda self: self.nf),
    }
