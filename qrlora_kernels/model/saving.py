"""Write what was trained to one file, in the form that loads again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters.options import Options, plain_value
from ..files import save_tensors
from ..nn import AdapterLinear, zero3
from ..nn import quantised as few_bits
from ..nn.base_weight import present, reshard, whole
from .adapt import adapter_type, require_adapted, trained
from .advice import followed
from .comparing import sharded
from .known import known_of
from .manifest import (
    AdapterFile,
    Entry,
    all_finite,
    describe_weight,
    file_at,
    metadata_of,
    packed,
    sampled,
)
from .names import buffers, check_model, parameters, unwrapped
from .targets import refuse_flattened
from .tensors import values_of

Factors = Literal["auto", "stored", "rebuild"]
UNFLATTEN = (
    "call save_adapter(model.module, path) inside "
    "FullyShardedDataParallel.summon_full_params(model), or use fully_shard"
)


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    factors: Factors = "auto",
    progress: bool = False,
) -> None:
    """Write everything that was trained to one safetensors file.

    That is the trained numbers of every adapted layer, every other parameter that requires grad (a
    task head) and buffers (running statistics, counts). The file is written under a temporary name
    and renamed, so a failure leaves an earlier file as it was. A layer whose base weight was
    changed since its adapter began is written with that weight.

    Parameters
    ----------
    model : nn.Module
        With adapted layers, merged or not, wrapped or not. Of a model that ``fully_shard`` or
        DeepSpeed's ZeRO-3 spread every rank calls it, and rank 0 writes.
    path : str or path
        Its folder is made if it does not exist; in a folder, the file is ``adapter.safetensors``.
    factors : "auto", "stored" or "rebuild"
        Whether the frozen factors are in the file or are recomputed from the base on loading. QR
        factors follow from W and their pivots, so "auto" stores the pivots alone where they give
        the layer's factors back bit for bit, as they do unless the model was cast or changed since;
        all other factors are stored.
    progress : bool
        Show a bar over the layers.

    Raises
    ------
    ValueError
        If the model has no adapted layer, is in an FSDP1 wrapper or has tensors without data,
        ``factors`` is none of the three, or it is "rebuild" for factors that do not follow from
        the base.
    """
    if factors not in get_args(Factors):
        raise ValueError(f"factors must be one of {list(get_args(Factors))}, got {factors!r}")
    progress = plain_value("progress", "bool", progress)
    check_model(model)
    with zero3.gathered(p for p in model.parameters() if p.requires_grad):
        write(model, path, contents(model, factors, progress))


def write(model: nn.Module, path: str | os.PathLike[str], content: Contents) -> None:
    """What :func:`contents` found in ``model``, whole or not at all, with what is to be told."""
    file = file_at(path)
    _tell_changed({name: content.layers[name].options for name in content.changed})
    _tell_left_out(content.left_out)
    _tell_not_finite(content)
    tensors, manifest = packed(content.in_file(file))
    _write(model, file, tensors, metadata_of(manifest, tensors))


@dataclass
class Contents:
    """What goes into the file, as it is found: the fields of :class:`AdapterFile`, and more."""

    layers: dict[str, Entry] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)  # without further names of tied ones
    thawed: set[str] = field(default_factory=set)
    tied: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)  # base weights by the layer's name
    left_out: list[str] = field(default_factory=list)

    def in_file(self, path: Path) -> AdapterFile:
        """As :func:`read` would give it."""
        again = {name: self.extra[first] for name, first in self.tied.items()}
        thawed = self.thawed | {name for name, first in self.tied.items() if first in self.thawed}
        return AdapterFile(
            path,
            self.layers,
            self.extra | again,
            frozenset(thawed),
            self.tied,
            self.frozen,
            self.tensors,
        )

    def put(self, trained: Mapping[str, Tensor]) -> None:
        """Other numbers of what trains, by full names: in the adapters, and beside them."""
        beside = {name: t for name, t in trained.items() if name not in self.tensors}
        self.tensors |= {name: t for name, t in trained.items() if name in self.tensors}
        self.extra |= beside
        self.thawed |= beside.keys()
        for name in beside:
            self.frozen.pop(name, None)


def contents(model: nn.Module, factors: Factors = "auto", progress: bool = False) -> Contents:
    """What :func:`save_adapter` writes; tensors may be those of the model."""
    refuse_flattened(model, UNFLATTEN)
    root, layers = unwrapped(model), require_adapted(model)
    reshard(root)
    content = Contents()
    for name, layer in tqdm(layers.items(), "save", disable=not progress):
        with present(layer):
            _add_layer(content, name, layer, factors)
    _add_others(content, root, layers)
    return content


# --- adapted layers


def _add_layer(content: Contents, name: str, layer: AdapterLinear, factors: Factors) -> None:
    weight = whole(layer.base_weight)
    own = {key: whole(getattr(layer, key)) for key in (*layer.trainables, *layer.held_factors())}
    _check_data({f"{name}.{key}": t for key, t in {"weight": weight, **own}.items()})
    known, changed = known_of(layer, weight), layer.base_changed()
    follow = factors != "stored" and _follow(layer, factors) and not changed
    follow = follow and known.rebuilds(layer, weight)
    if factors == "rebuild" and not follow:
        raise ValueError(
            f"factors must be 'auto' or 'stored' for {name}, whose factors do not follow from its "
            f"weight (by their option, or it was cast or changed after adapt), got {factors!r}"
        )
    kept = (*layer.trainables, *(layer.adapter.rebuilt_from if follow else layer.held_factors()))
    content.tensors |= {f"{name}.{key}": _narrowed(own[key], key, layer) for key in kept}
    content.layers[name] = Entry(
        adapter_type(layer.kind),
        layer.options,
        not follow,
        describe_weight(layer, weight, known.fingerprint(layer, weight)),
        # Factors that nothing small gives back must come back bit for bit.
        {} if layer.adapter.rebuilt_from else known.digests(layer),
    )
    if changed:
        if few_bits.is_quantised(weight):
            raise ValueError(
                f"{name} must have the quantised weight that its adapter began with, got another, "
                "which a file does not hold: call qk.refresh(model) and train again"
            )
        # ZeRO-3 takes away again what it gathered.
        content.changed[name] = weight.clone() if hasattr(weight, "ds_shape") else weight


def _follow(layer: AdapterLinear, factors: Factors) -> bool:
    """Whether the factors are to be recomputed from the weight, if that gives their bits."""
    adapter = layer.adapter
    asked = factors == "rebuild" or bool(adapter.rebuilt_from)
    return asked and adapter.rebuildable(layer.options)


def _narrowed(tensor: Tensor, key: str, layer: AdapterLinear) -> Tensor:
    """Column indices take half the room as int32."""
    index = key in layer.adapter.rebuilt_from and not tensor.is_floating_point()
    return tensor.int() if index else tensor


def _check_data(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"model must hold data, got {name} on the meta device")


# --- everything else


def _add_others(content: Contents, root: nn.Module, layers: dict[str, AdapterLinear]) -> None:
    own = {id(p) for layer in layers.values() for p in trained(layer)}
    unmerged = {id(layer.weight): layer.base_weight for layer in layers.values()}
    held = {n: unmerged.get(id(p), p) for n, p in parameters(root).items()}
    moving = buffers(root)
    thawed = {n: p for n, p in held.items() if p.requires_grad and id(p) not in own}
    content.left_out = [n for n, b in moving.items() if b.layout != torch.strided]
    extra = thawed | {n: b for n, b in moving.items() if n not in content.left_out}
    changed = {id(weight) for weight in content.changed.values()}
    extra |= {n: p for n, p in held.items() if id(p) in changed}
    names = _names_of(extra)
    first = {name for name, *_ in names}
    values = {n: t for n, t in values_of(root, extra).items() if n in first}
    # Of an offloaded layer the parameter is another tensor than the weight that was brought in.
    changed_too = {f"{name}.weight": weight for name, weight in content.changed.items()}
    values |= {n: w for n, w in changed_too.items() if n in first or n not in extra}
    _check_data(values)
    adapted = {f"{name}.weight" for name in layers}
    rest = {
        n: p for n, p in held.items() if n not in extra and n not in adapted and id(p) not in own
    }
    content.extra, content.thawed = values, thawed.keys() & first
    content.tied = {other: name for name, *others in names for other in others}
    content.frozen = {}
    for name, p in rest.items():  # one by one: they may be gathered for it
        (value,) = values_of(root, {name: p}).values()
        if not value.is_meta:
            content.frozen[name] = sampled(value)


def _names_of(tensors: dict[str, Tensor]) -> list[list[str]]:
    """The names of each tensor, the first one first."""
    found: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault(id(tensor), []).append(name)
    return list(found.values())


# --- the file


def _write(model: nn.Module, path: Path, tensors: dict[str, Tensor], metadata: Any) -> None:
    with of_one_rank(model) as writes:
        if writes:
            save_tensors(path, tensors, metadata)


@contextmanager
def of_one_rank(model: nn.Module | None) -> Iterator[bool]:
    """Whether this process is to write: of a sharded model's, which must all call, rank 0.

    What it wrote is there when the block ends, on every rank.
    """
    spread = model is not None and bool(sharded(unwrapped(model)))
    yield not spread or dist.get_rank() == 0
    if spread:
        dist.barrier()


def _tell_changed(layers: dict[str, Options]) -> None:
    if layers:
        warnings.warn(
            f"the base weights of {', '.join(layers)} were changed after their adapters began; the "
            "file holds these weights too, so that it loads over either base. If a checkpoint was "
            f"loaded after adapt, call qk.refresh(model) before training{followed(layers)}",
            stacklevel=4,
        )


def _tell_left_out(names: list[str]) -> None:
    if names:
        warnings.warn(
            "sparse buffers are not saved, and loading leaves them as they are: "
            f"{', '.join(names)}",
            stacklevel=4,
        )


def _tell_not_finite(content: Contents) -> None:
    # Buffers may hold infinite numbers: masks do.
    trained_here = content.thawed | {f"{name}.weight" for name in content.changed}
    held = content.tensors | {n: t for n, t in content.extra.items() if n in trained_here}
    bad = [name for name, tensor in held.items() if not all_finite(tensor)]
    if bad:
        warnings.warn(
            f"saved with NaN or infinite numbers, and not to be loaded: {', '.join(bad)}",
            stacklevel=4,
        )
