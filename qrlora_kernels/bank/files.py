"""Files of single adapters, checked against the start that the adapters of a bank share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters import State
from ..adapters.combining import begin_alike, resized
from ..adapters.low_rank import LowRank
from ..model.known import known_of
from ..model.manifest import AdapterFile, Entry, file_at, format_of, read
from ..model.saving import contents, write
from ..nn import AdapterLinear
from . import packed
from .layout import Layout


def save(model: nn.Module, layout: Layout, row: Tensor, path: str | os.PathLike[str]) -> None:
    """Write the adapter of one ``row`` as a file of save_adapter."""
    _require_own(layout)
    content = contents(model)
    content.put(layout.state(row))
    write(model, path, content)


def read_all(layout: Layout, paths: Any, progress: bool) -> dict[str, Tensor]:
    """The row [P] of every adapter in the files, by name."""
    found: dict[str, Tensor] = {}
    for name, path in tqdm(_named(paths), "load", disable=not progress):
        is_packed = file_at(path).is_file() and format_of(path) == packed.FORMAT
        if is_packed and name is not None:
            raise ValueError(f"paths must not name {path} {name!r}: it holds names of its own")
        rows = packed.read(layout, path) if is_packed else {}
        if not is_packed:
            file = read(path)
            rows = {name or _stem(file): layout.row(_state(layout, file))}
        if twice := found.keys() & rows.keys():
            raise ValueError(f"paths must bring each name once, got {sorted(twice)[0]!r} twice")
        found |= rows
    return found


def _named(paths: Any) -> list[tuple[str | None, Any]]:
    if isinstance(paths, Mapping):
        return list(paths.items())
    if isinstance(paths, (str, os.PathLike)):
        return [(None, paths)]
    if not isinstance(paths, Iterable):
        raise TypeError(f"paths must be a path, several or a dict, got {type(paths).__name__}")
    return [(None, path) for path in paths]


def _stem(file: AdapterFile) -> str:
    """The name of the file, or of its folder where all files have the same name."""
    return file.path.parent.name if file.path.stem == "adapter" else file.path.stem


def _require_own(layout: Layout) -> None:
    if not all(isinstance(layer, AdapterLinear) for layer in layout.layers.values()):
        raise ValueError(
            "model must be one that adapt() made for files of single adapters; under PEFT load "
            "and save them there, and use add() and state(), or pack()"
        )


def _state(layout: Layout, file: AdapterFile) -> State:
    """What trains in the file, of the ranks that the bank has."""
    _require_own(layout)
    if file.layers.keys() != layout.layers.keys():
        other = sorted(file.layers.keys() ^ layout.layers.keys())
        raise ValueError(
            f"{file.path} must hold the layers of the bank and no others, got a difference in "
            f"{', '.join(other[:3])}"
        )
    state: State = {}
    for name, layer in layout.layers.items():
        assert isinstance(layer, AdapterLinear)
        entry = file.layers[name]
        own = {key: file.tensors[f"{name}.{key}"] for key in entry.keys}
        _check_start(file, name, layer, entry, own)
        for key in layer.trainables:
            state[f"{name}.{key}"] = own[key]
            if issubclass(layer.adapter, LowRank):
                state[f"{name}.{key}"] = resized(own[key], layer.rank)
    wanted = layout.places.keys() - state.keys()
    state |= {key: file.extra[key] for key in wanted if key in file.extra}
    if stray := (file.thawed & file.extra.keys()) - layout.places.keys():
        raise ValueError(
            f"{file.path} brings what the bank has no room for: {', '.join(sorted(stray)[:3])}; "
            "name it in heads when the bank is made"
        )
    return state


def _check_start(
    file: AdapterFile, name: str, layer: AdapterLinear, entry: Entry, own: State
) -> None:
    """Raise unless the file's adapter begins from the layer's factors, or from their first ones."""
    if entry.kind.kind != layer.kind:
        raise ValueError(
            f"{file.path} must have the kind of the bank in {name}, {layer.kind}, got "
            f"{entry.kind.kind}"
        )
    known = known_of(layer, layer.base_weight)
    rank = own[layer.trainables[0]].shape[-1]
    scaling = entry.options.scaling_of(rank) * entry.options.strength
    wanted = {
        "scaling": (scaling, layer._strength),
        "base": (entry.weight["fingerprint"], known.fingerprint(layer, layer.base_weight)),
    }
    for what, (have, want) in wanted.items():
        if have != want:
            raise ValueError(
                f"{file.path} must have the {what} of the bank in {name}, {want}, got {have}"
            )
    if not _begins_alike(layer, entry, own, rank):
        raise ValueError(
            f"{file.path} must begin from the factors of the bank in {name}, and it has others"
        )


def _begins_alike(layer: AdapterLinear, entry: Entry, own: State, rank: int) -> bool:
    adapter, weight = layer.adapter, layer.base_weight
    if rank > layer.rank:
        return False
    here = {key: factor.cpu() for key, factor in layer.frozen_now().items()}
    if not issubclass(adapter, LowRank):
        return all(torch.equal(factor, own[key]) for key, factor in here.items())
    rebuilt = not entry.stored_factors
    if rebuilt and not known_of(layer, weight).rebuilds(layer, weight):
        return False
    return begin_alike(adapter, here, own, rank, rebuilt)
