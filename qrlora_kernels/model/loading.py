"""Adapt a model with what a file holds: everything is checked before anything changes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..fingerprint import fingerprint
from ..nn import AdapterLinear, base_weight
from ..nn.adapter import State
from ..nn.become import check_can_become, over, restore
from . import lifecycle, memory, tensors
from .adapt import adapted_layers, attach, freeze_all_but_adapters, thaw
from .manifest import AdapterFile, Entry, describe_weight, read, sampled
from .names import buffers, modules, parameters, unwrapped
from .targets import refuse_wrapped
from .watch import watch

CHANGED = "changed"  # as digest of a start: that of a weight which is not there


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    progress: bool = False,
    strict: bool = False,
) -> nn.Module:
    """Adapt ``model`` with what :func:`save_adapter` wrote, in place.

    Everything is read and checked before the first layer changes: after an error the model is as it
    was. Layers that are adapted already take the numbers into the parameters they have, where kind
    and shapes agree, so that an optimizer goes on with them. In a model that had no adapter all
    else is frozen, save the parameters that were trained beside it. What the file overwrites there
    comes back with the next file or with ``unload(merge=False)``.

    Parameters
    ----------
    model : nn.Module
        The base model the adapter was trained over, compiled or wrapped or not.
    path : str or path
        The file, or a folder with an ``adapter.safetensors``.
    progress : bool
        Show a bar over the layers.
    strict : bool
        Refuse a model whose other weights, of which the file knows some elements each, are not
        those that the adapter was trained in; by default a warning names them.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no complete adapter file or of a newer format, or the model is not the base:
        a layer is missing or its weight has another shape, dtype or content.
    """
    file = read(Path(path))
    root = unwrapped(model)
    prepared = _prepare(root, file, progress)
    _check_extra(root, file)
    _check_others(root, file, strict)
    if any(not _same(prepared[n], modules(root)[n], entry) for n, entry in file.layers.items()):
        refuse_wrapped(model)
    _apply(root, file, prepared)
    return model


def _apply(root: nn.Module, file: AdapterFile, prepared: dict[str, State]) -> None:
    here, first = modules(root), memory.recorded(root) is None
    record = memory.begin(root)
    lifecycle.put_replaced_back(root, record)
    fresh: dict[type[AdapterLinear], dict[str, State]] = {}
    for name, entry in file.layers.items():
        layer = here[name]
        if isinstance(layer, AdapterLinear):
            layer.unmerge()
            if _same(prepared[name], layer, entry):
                layer._options = entry.options
                layer.take_state(prepared[name])
                continue
            restore(layer)
        fresh.setdefault(entry.adapter, {})[name] = prepared[name]
    for kind, states in fresh.items():
        attach(root, {n: (file.layers[n].options, state) for n, state in states.items()}, kind)
    if first:
        freeze_all_but_adapters(root)
    _take_extra(root, file)
    for name in file.layers:
        layer = here[name]
        assert isinstance(layer, AdapterLinear)
        with base_weight.present(layer):
            kept = f"{name}.weight" in file.extra and f"{name}.weight" not in file.thawed
            layer._start = CHANGED if kept else base_weight.digest(layer)
    watch(root)


def _take_extra(root: nn.Module, file: AdapterFile) -> None:
    record = memory.begin(root)
    adapted = {f"{name}.weight" for name in file.layers}
    wide = [n for n in file.thawed - adapted if file.extra[n].dtype == torch.float32]
    for name in file.extra:
        record.replaced.setdefault(name, tensors.value_of(root, name).cpu().clone())
    thaw(root, sorted(file.thawed - set(wide)), None)
    thaw(root, sorted(wide), torch.float32)
    for name, tensor in file.extra.items():
        tensors.put(root, name, tensor)


def _same(state: State, layer: nn.Module, entry: Entry) -> bool:
    """Whether ``layer`` is adapted already as the file's is, with parameters of the same shapes."""
    return isinstance(layer, entry.adapter) and all(
        getattr(layer, key).shape == state[key].shape for key in entry.adapter.trainables
    )


# --- checks


def _prepare(root: nn.Module, file: AdapterFile, progress: bool) -> dict[str, State]:
    """The tensors of every layer, checked against the base that is there."""
    stray = sorted(set(adapted_layers(root)) - set(file.layers))
    if stray:
        raise ValueError(
            f"model has adapted layers that {file.path} does not know: {', '.join(stray)}"
        )
    here = modules(root)
    states = {}
    for name, entry in tqdm(file.layers.items(), "load", disable=not progress):
        if name not in here:
            raise ValueError(f"model has no layer {name}, which the adapter was trained on")
        states[name] = _state(here[name], name, entry, file)
    return states


def _state(layer: nn.Module, name: str, entry: Entry, file: AdapterFile) -> State:
    if isinstance(layer, AdapterLinear):
        over(layer)  # that nothing stands on top of it
    else:
        check_can_become(layer, entry.adapter, name)
    with base_weight.present(layer):
        weight = layer.base_weight if isinstance(layer, AdapterLinear) else layer.weight
        assert isinstance(weight, Tensor)
        _check_weight(layer, weight, name, entry, file)
        device = weight.device
        own = {key: file.tensors[f"{name}.{key}"].to(device) for key in entry.keys}
        _check_finite(own, name, file)
        own = {k: t.to(torch.int64) if t.dtype == torch.int32 else t for k, t in own.items()}
        matrix = weight.t() if base_weight.is_conv1d(layer) else weight
        return own | _factors(name, entry, matrix.detach(), own)


def _check_weight(
    layer: nn.Module, weight: Tensor, name: str, entry: Entry, file: AdapterFile
) -> None:
    have, want = describe_weight(layer, weight), entry.weight
    for key in ("conv1d", "shape", "dtype", "fingerprint"):
        brought = key == "fingerprint" and f"{name}.weight" in file.extra
        if have[key] != want[key] and not brought:
            raise ValueError(
                f"{name}.weight is not the weight the adapter was trained over: its {key} must be "
                f"{want[key]}, got {have[key]}"
            )


def _check_finite(own: State, name: str, file: AdapterFile) -> None:
    for key, tensor in own.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{file.path} holds NaN or infinite numbers in {name}.{key}")


def _factors(name: str, entry: Entry, weight: Tensor, own: State) -> State:
    kind = entry.adapter
    if entry.stored_factors:
        return {key: own[key] for key in kind.factors}
    try:
        factors = kind.rebuild(weight, entry.options, {key: own[key] for key in kind.compact})
    except ValueError as error:
        raise ValueError(f"the factors of {name} cannot be rebuilt: {error}") from None
    for key, digest in entry.digests.items():
        if fingerprint(factors[key]) != digest:
            raise ValueError(
                f"the factor {key} of {name}, recomputed here, differs from the one that was "
                "trained with; save the adapter with factors='stored' where it was trained"
            )
    return factors


def _check_extra(root: nn.Module, file: AdapterFile) -> None:
    here: dict[str, Tensor] = {**buffers(root), **parameters(root)}
    for name, tensor in file.extra.items():
        have = list(here[name].shape) if name in here else "no such parameter"
        if have != list(tensor.shape):
            raise ValueError(
                f"model must have a parameter {name} of shape {list(tensor.shape)} for "
                f"{file.path}, got {have}"
            )


def _check_others(root: nn.Module, file: AdapterFile, strict: bool) -> None:
    """Compare what the adapter was trained in beside its own layers."""
    if file.frozen is None:
        if strict:
            raise ValueError(
                f"strict needs a file that knows the whole base, got {file.path} of an earlier "
                "release"
            )
        return
    here = parameters(root)
    record = memory.recorded(root)
    before = record.replaced if record is not None else {}
    other = [
        name
        for name, digest in file.frozen.items()
        if name not in here
        or (not here[name].is_meta and sampled(before.get(name, here[name])) != digest)
    ]
    if not other:
        return
    said = (
        f"the model differs from the one that {file.path} was trained in, beside the adapted "
        f"layers: {', '.join(other)}"
    )
    if strict:
        raise ValueError(said)
    warnings.warn(said, stacklevel=3)
