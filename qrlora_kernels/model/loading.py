"""Adapt a model with what a file holds: everything is checked before anything changes."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..adapters import State
from ..adapters.options import plain_value
from ..fingerprint import quick_digest
from ..linalg.ranks import Ranks, require_agreement, several_ranks
from ..nn import AdapterLinear, base_weight, switch
from ..nn.become import restore
from . import lifecycle, memory, tensors
from .adapt import adapted_layers, attach, freeze_all_but_adapters, thaw
from .comparing import check_extra, check_others, check_sharded, prepare, same, sharded
from .manifest import AdapterFile, read
from .memory import Adaptation
from .names import check_model, modules, named_tensors, unwrapped
from .targets import refuse_flattened, refuse_wrapped
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
    and shapes agree, so that an optimizer goes on with them; so does a model that ``fully_shard``
    spread over ranks, each of which calls this and takes its part. In a model that had no adapter
    all else is frozen, save the parameters that were trained beside it. What the file overwrites
    there comes back with the next file or with ``unload(merge=False)``.

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
        If the file is no complete adapter file or of a newer format, the model is sharded and not
        adapted as the file's was, or it is not the base: a layer is missing or its weight has
        another shape, dtype or content.
    TypeError
        If a layer can no longer be adapted, because something stands on top of it.
    """
    check_loadable(model)
    progress = plain_value("progress", "bool", progress)
    strict = plain_value("strict", "bool", strict)
    base_weight.reshard(model)
    file = _read_together(path) if sharded(unwrapped(model)) else read(path)
    return load(model, file, progress, strict)


def check_loadable(model: nn.Module) -> None:
    """Raise where nothing that is loaded would train or find its place."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "load_adapter must not be called under torch.inference_mode: nothing would train"
        )
    check_model(model)
    refuse_flattened(model)


def load(model: nn.Module, file: AdapterFile, progress: bool, strict: bool) -> nn.Module:
    """Adapt ``model`` with what ``file`` holds, wherever that came from."""
    root = unwrapped(model)
    check_sharded(root, file)
    prepared = prepare(root, file, progress)
    check_extra(root, file)
    check_others(root, file, strict)
    if any(not same(prepared[n], modules(root)[n], entry) for n, entry in file.layers.items()):
        refuse_wrapped(model)
        switch.check_on(adapted_layers(root).values(), "load_adapter with other adapters")
    _apply(root, file, prepared)
    return model


def _read_together(path: str | os.PathLike[str]) -> AdapterFile:
    """What all ranks read; an error of one is raised on all, or the others would wait for it."""
    if not several_ranks():
        return read(path)
    ranks = Ranks()
    file = ranks.together(lambda: read(path))
    tensors = file.tensors | file.extra
    digests = {f"{name} in the file": quick_digest(t) for name, t in tensors.items()}
    require_agreement(ranks, (), digests)
    return file


def _apply(root: nn.Module, file: AdapterFile, prepared: dict[str, State]) -> None:
    here, first = modules(root), memory.recorded(root) is None
    record = memory.begin(root)
    for adapted in adapted_layers(root).values():
        adapted.unmerge()
    lifecycle.put_replaced_back(root, record, but=file.extra.keys())
    fresh: dict[type[AdapterLinear], dict[str, State]] = {}
    for name, entry in file.layers.items():
        layer = here[name]
        if isinstance(layer, AdapterLinear):
            if same(prepared[name], layer, entry):
                layer._options = entry.options
                layer.take_state(prepared[name])
                continue
            restore(layer)
        fresh.setdefault(entry.kind, {})[name] = prepared[name]
    for kind, states in fresh.items():
        attach(root, {n: (file.layers[n].options, state) for n, state in states.items()}, kind)
    if first:
        freeze_all_but_adapters(root)
    _take_extra(root, file, record)
    for name, adapted in adapted_layers(root).items():
        _begin(adapted, brought=f"{name}.weight" in file.extra)
    watch(root)


def _begin(layer: AdapterLinear, brought: bool) -> None:
    """Let the layer know which weight its factors came from, and compute what follows from it."""
    with base_weight.present(layer):
        layer._start = CHANGED if brought else base_weight.digest(layer)
    layer.options = layer.options


def _take_extra(root: nn.Module, file: AdapterFile, record: Adaptation) -> None:
    here = named_tensors(root)
    brought = {name: tensor for name, tensor in file.extra.items() if name in here}
    for name in brought:
        if name not in record.replaced:
            record.replaced[name] = tensors.value_of(root, name).cpu().clone()
    thawed = {name: brought[name].dtype for name in brought if name in file.thawed}
    record.thawed |= {name for name in thawed if not here[name].requires_grad}
    for dtype in dict.fromkeys(thawed.values()):
        thaw(root, [name for name in thawed if thawed[name] == dtype], dtype)
    for name, tensor in brought.items():
        tensors.put(root, name, tensor)
