"""What must agree between an adapter file and the model that it is loaded into.

Nothing here changes the model.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters import State
from ..fingerprint import fingerprint
from ..nn import AdapterLinear, base_weight
from ..nn.become import check_can_become, over
from ..reference import HALF
from . import heads, memory
from .adapt import adapted_layers
from .manifest import AdapterFile, Entry, all_finite, describe_weight, sampled
from .memory import Adaptation
from .names import modules, named_tensors, parameters
from .tensors import value_of


def sharded(root: nn.Module) -> list[str]:
    """The names of the parameters that ``fully_shard`` or ZeRO-3 spread over the ranks."""
    return [name for name, p in parameters(root).items() if base_weight.is_part(p)]


def refuse_sharded(root: nn.Module, way_out: str) -> None:
    """Raise if the model's tensors are spread over ranks, as a file's are not."""
    if spread := sharded(root):
        raise ValueError(
            f"model must not be sharded yet, got {spread[0]} as a part of each rank: {way_out}"
        )


def check_sharded(root: nn.Module, file: AdapterFile) -> None:
    """Raise where a sharded model would have to get other parameters than it has."""
    if not sharded(root):
        return
    here, named = modules(root), parameters(root)
    fits = all(
        name in here and same(file.tensors_of(name), here[name], entry)
        for name, entry in file.layers.items()
    )
    if not fits or any(name in named and not named[name].requires_grad for name in file.thawed):
        refuse_sharded(
            root,
            f"adapt it as {file.path} was, the same layers, ranks and trainable=, or load the "
            "adapter, and then call fully_shard",
        )


def prepare(root: nn.Module, file: AdapterFile, progress: bool) -> dict[str, State]:
    """The tensors of every layer, checked against the base that is there."""
    stray = sorted(set(adapted_layers(root)) - set(file.layers))
    if stray:
        raise ValueError(
            f"model has adapted layers that {file.path} does not know: {', '.join(stray)}"
        )
    here, record = modules(root), memory.recorded(root) or Adaptation()
    states = {}
    for name, entry in tqdm(file.layers.items(), "load", disable=not progress):
        if name not in here:
            raise ValueError(f"model has no layer {name}, which the adapter was trained on")
        states[name] = _state(here[name], name, entry, file, record)
    return states


def same(state: State, layer: nn.Module, entry: Entry) -> bool:
    """Whether ``layer`` is adapted already as the file's is, with parameters of the same shapes."""
    return isinstance(layer, entry.kind) and all(
        getattr(layer, key).shape == state[key].shape for key in entry.kind.trainables
    )


# --- adapted layers


def _state(
    layer: nn.Module, name: str, entry: Entry, file: AdapterFile, record: Adaptation
) -> State:
    with base_weight.present(layer):
        _check_can_become(layer, name, entry)
        weight = layer.base_weight if isinstance(layer, AdapterLinear) else layer.weight
        assert isinstance(weight, Tensor)
        weight = base_weight.whole(weight)
        device = weight.device
        # An earlier file's weight goes before this file comes; the model may have been cast since.
        if f"{name}.weight" in record.replaced:
            before = record.replaced[f"{name}.weight"]
            weight = base_weight.whole(before).to(weight)
        _check_weight(layer, weight, name, entry, file)
        own = {key: file.tensors[f"{name}.{key}"].to(device) for key in entry.keys}
        _check_finite({f"{name}.{key}": tensor for key, tensor in own.items()}, file)
        own = {k: t.to(torch.int64) if t.dtype == torch.int32 else t for k, t in own.items()}
        if entry.stored_factors:
            return own
        return own | _rebuilt(name, entry, base_weight.matrix(layer, weight), own)


def _check_can_become(layer: nn.Module, name: str, entry: Entry) -> None:
    if isinstance(layer, AdapterLinear):
        if not base_weight.is_sharded(layer):  # which stays as it is, or was refused
            over(layer)  # that nothing stands on top of it
        if isinstance(layer, entry.kind):
            return
        layer = layer.to_linear(merge=False)
    check_can_become(layer, entry.kind, name)


def _check_weight(
    layer: nn.Module, weight: Tensor, name: str, entry: Entry, file: AdapterFile
) -> None:
    brought = f"{name}.weight" in file.extra
    digest = "" if brought else base_weight.exact_digest(layer, weight)
    have = describe_weight(layer, weight, digest)
    for key in ("conv1d", "shape", "dtype", "fingerprint"):
        want = entry.weight[key]
        if have[key] != want and not (brought and key == "fingerprint"):
            casts = key == "dtype" and hasattr(torch, want) and hasattr(torch, have[key])
            way_out = f": cast the model with model.to(torch.{want})" if casts else ""
            raise ValueError(
                f"{name}.weight is not the weight the adapter was trained over: its {key} must be "
                f"{want}, got {have[key]}{way_out}"
            )


def _check_finite(named: dict[str, Tensor], file: AdapterFile) -> None:
    bad = [name for name, tensor in named.items() if not all_finite(tensor)]
    if bad:
        raise ValueError(f"{file.path} holds NaN or infinite numbers in {', '.join(bad)}")


def _rebuilt(name: str, entry: Entry, weight: Tensor, own: State) -> State:
    adapter = entry.kind.adapter
    try:
        kept = {key: own[key] for key in adapter.rebuilt_from}
        factors = adapter.rebuild(weight, entry.options, kept)
    except ValueError as error:
        raise ValueError(f"the factors of {name} cannot be rebuilt: {error}") from None
    for key, digest in entry.digests.items():
        if fingerprint(factors[key]) != digest:
            raise ValueError(
                f"the factor {key} of {name}, recomputed here, differs from the one that was "
                "trained with; save the adapter with factors='stored' where it was trained"
            )
    return factors


# --- everything else


def check_extra(root: nn.Module, file: AdapterFile) -> None:
    """Raise unless what was trained beside the adapters finds its place and keeps its numbers."""
    here = named_tensors(root)
    brought = {f"{name}.weight" for name in file.layers}
    _check_finite({n: file.extra[n] for n in (file.thawed | brought) & file.extra.keys()}, file)
    for name, tensor in file.extra.items():
        have = here.get(name)
        if have is None and name in file.tied:
            continue  # it has the tensor under its first name
        shape = "no such parameter" if have is None else list(have.shape)
        if shape != list(tensor.shape):
            raise ValueError(
                f"model must have a parameter {name} of shape {list(tensor.shape)} for "
                f"{file.path}, got {shape}"
            )
        assert have is not None
        if have.is_meta and value_of(root, name).is_meta:
            raise ValueError(f"model must hold data, got {name} on the meta device")
        if not (_holds(have, tensor) or _widened(name, have, file)):
            raise ValueError(
                f"model must have a parameter {name} of dtype {tensor.dtype} for {file.path}, got "
                f"{have.dtype}, which rounds its numbers"
            )


def _holds(have: Tensor, tensor: Tensor) -> bool:
    """Whether the dtype of ``have`` keeps every number of ``tensor``."""
    if have.dtype == tensor.dtype:
        return True
    back = tensor.to(have.dtype).to(tensor.dtype)
    return fingerprint(back) == fingerprint(tensor)


def _widened(name: str, have: Tensor, file: AdapterFile) -> bool:
    """Whether loading keeps the tensor wider than it is here: as what trains, or lies beside it."""
    tops = {one.rpartition(".")[0] for one in file.thawed if file.extra[one].dtype not in HALF}
    return have.dtype in HALF and (name in file.thawed or name.rpartition(".")[0] in tops)


def check_others(root: nn.Module, file: AdapterFile, strict: bool) -> None:
    """Compare what the adapter was trained in beside its own layers."""
    if file.frozen is None:
        if strict:
            raise ValueError(
                f"strict needs a file that knows the whole base, got {file.path} of an earlier "
                "release"
            )
        return
    other = _others(root, file.frozen, memory.recorded(root) or Adaptation())
    if not other:
        return
    said = (
        f"the model differs from the one that {file.path} was trained in, beside the adapted "
        f"layers: {', '.join(other)}"
    )
    if strict:
        raise ValueError(said)
    warnings.warn(said, stacklevel=4)


def _others(root: nn.Module, frozen: dict[str, str], record: Adaptation) -> list[str]:
    """What differs, as it was before an earlier file and before heads were kept wide."""
    here, meant = parameters(root), heads.meant(root)
    found = []
    for name, digest in frozen.items():
        if name in here:
            tensor = record.replaced.get(name, here[name])
            tensor = value_of(root, name) if tensor.is_meta else base_weight.whole(tensor)
            tensor = tensor.to(meant[name]) if name in meant else tensor
            if tensor.is_meta or sampled(tensor) == digest:
                continue
        found.append(name)
    return found
