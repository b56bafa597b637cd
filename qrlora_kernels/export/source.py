"""Where an adapter to export comes from: a model, a model under PEFT, a bank or a file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..bank import AdapterBank
from ..model import memory
from ..model.adapt import require_adapted, trained
from ..model.comparing import refuse_sharded
from ..model.manifest import read
from ..model.names import modules, parameters, under, unwrapped
from ..model.targets import refuse_flattened
from ..nn import AdapterLinear
from ..nn.base_weight import is_conv1d, reshard
from ..nn.offload import is_away
from ..nn.per_row import ByRow
from . import under_peft
from .beside import TO_MERGED, state_of, tell_changed, tell_statistics, whole_modules
from .of_file import of_file
from .records import Source, Update

UNSHARDED = "save_adapter here, and export from the model before it is sharded or wrapped"


def source_of(given: Any, adapter: str | None) -> Source:
    """The adapter in a model, a bank or a file.

    Parameters
    ----------
    given : nn.Module, AdapterBank, str or path
    adapter : str or None
        Which one, where several have names.

    Raises
    ------
    TypeError, ValueError
        If there is none, or it cannot be told which; if a model under PEFT or a bank is sharded.
    """
    if adapter is not None and not isinstance(adapter, str):
        raise TypeError(f"adapter must be a name, got {type(adapter).__name__}")
    if isinstance(given, AdapterBank):
        return _of_bank(given, adapter)
    if isinstance(given, (str, os.PathLike)):
        _refuse_name(adapter, "a file")
        return of_file(read(given))
    refuse_flattened(given, UNSHARDED)
    root = unwrapped(given)
    if under_peft.holds(root):
        refuse_sharded(root, UNSHARDED)
        return _of_peft(root, adapter)
    _refuse_name(adapter, "a model that adapt made")
    return _of_model(root)


def _refuse_name(adapter: str | None, of: str) -> None:
    if adapter is not None:
        raise ValueError(f"adapter must be None for {of}, which holds one, got {adapter!r}")


# --- a model that adapt or load_adapter made


def _of_model(root: nn.Module) -> Source:
    layers = require_adapted(root)
    reshard(root)
    under_peft.refuse_others(root)
    _refuse_shared(root, layers)
    tied = tied_layers(root, layers)
    updates = {
        name: Update(
            layer.adapter,
            layer.whole_tensors(),
            layer.options,
            layer._strength,
            layer.conv1d,
            name in tied,
        )
        for name, layer in layers.items()
    }
    tell_changed([name for name, layer in layers.items() if layer.base_changed()])
    own = {id(p) for layer in layers.values() for p in trained(layer)}
    own |= {id(layer.weight) for layer in layers.values()}
    record = memory.recorded(root)
    brought = set() if record is None else record.replaced.keys()
    in_full = [
        name
        for name, p in parameters(root).items()
        if id(p) not in own and (p.requires_grad or name in brought)
    ]
    heads = {name: state_of(root, name) for name in whole_modules(root, in_full, updates)}
    tell_statistics(root, heads)
    return Source(updates, heads, root)


def _owners(root: nn.Module) -> Counter[int]:
    """How many modules have each parameter."""
    return Counter(id(p) for m in root.modules() for p in m._parameters.values() if p is not None)


def tied_layers(root: nn.Module, layers: Mapping[str, AdapterLinear]) -> set[str]:
    """Those whose weight, before it was merged, is another module's too."""
    known, said = _owners(root), _said_tied(root, layers)
    own = {name: 0 if layer.merged else 1 for name, layer in layers.items()}
    seen = {name for name, layer in layers.items() if known[id(layer.base_weight)] > own[name]}
    return seen | said


def _said_tied(root: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Those that transformers ties and whose weight is away, as another tensor of each module."""
    tied = getattr(root, "all_tied_weights_keys", None) or {}
    names = {*tied, *tied.values()}
    return {n for n, layer in layers.items() if f"{n}.weight" in names and is_away(layer)}


def _refuse_shared(root: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    names = {id(layer): name for name, layer in layers.items()}
    for other, module in modules(root).items():
        if id(module) in names and other != names[id(module)]:
            raise ValueError(
                f"{names[id(module)]} and {other} are one module, and loaders put an adapter on "
                f"one of the two: {TO_MERGED}"
            )


# --- under PEFT


def _of_peft(root: nn.Module, adapter: str | None) -> Source:
    base = under_peft.base_of(root)
    name = under_peft.chosen(root, adapter)
    wrapped = under_peft.heads_of(base, name)
    under_peft.refuse_others(base)
    here = modules(base)
    layers: dict[str, Any] = under_peft.layers_of(base, name)
    known = _owners(base)
    said = _said_tied(base, {n: layer.get_base_layer() for n, layer in layers.items()})
    updates: dict[str, Update] = {}
    for layer_name, layer in layers.items():
        layer.compare(name)  # that it was loaded over its base
        linear = layer.get_base_layer()
        updates[layer_name] = Update(
            layer.adapter,
            layer.tensors(name),
            layer.options[name],
            layer.scaling[name],
            is_conv1d(linear),
            known[id(linear.weight)] > 1 or layer_name in said,
        )
    taken = [*wrapped, *(n for n, m in here.items() if isinstance(m, ByRow))]
    in_full = [n for n, p in parameters(base).items() if p.requires_grad and not under(n, taken)]
    in_full += [n for n in under_peft.trained_inside(base) if n not in in_full]
    heads = {n: state_of(base, n) for n in whole_modules(base, in_full, updates)}
    tell_statistics(base, heads | wrapped)
    return Source(updates, heads | wrapped, base)


# --- one adapter of a bank


def _of_bank(bank: AdapterBank, adapter: str | None) -> Source:
    if adapter is None:
        raise ValueError(f"adapter must name one of the bank, got None of {bank.names()[:5]}")
    refuse_sharded(bank.model, UNSHARDED)
    source = source_of(bank.model, None)
    state = {under_peft.plain_name(name): t for name, t in bank.state(adapter).items()}
    updates = {
        name: replace(
            update, tensors={k: state.pop(f"{name}.{k}", t) for k, t in update.tensors.items()}
        )
        for name, update in source.updates.items()
    }
    heads = dict(source.heads)
    for name, tensor in state.items():
        owner = _head_of(name, heads)
        assert source.root is not None
        held = heads.get(owner) or state_of(source.root, owner)
        heads[owner] = held | {name.removeprefix(f"{owner}."): tensor}
    return Source(updates, heads, source.root)


def _head_of(name: str, heads: Iterable[str]) -> str:
    """The head that the tensor ``name`` lies in, else the module that owns it."""
    return next((head for head in heads if under(name, [head])), name.rpartition(".")[0])
