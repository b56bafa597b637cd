"""Another rank for a model's adapters, over the same start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..adapters import Options, State
from ..adapters.combining import (
    NO_ORDER,
    begin_alike,
    check_nested,
    first_directions,
    require_low_rank,
    resized,
    with_rank,
)
from ..adapters.options import plain_value
from ..linalg import StartRunner
from ..nn import AdapterLinear, switch
from ..nn.base_weight import present
from ..nn.become import over
from .adapt import adapter_type, require_adapted, start_layers
from .comparing import refuse_sharded
from .known import known_of
from .names import unwrapped
from .strength import refuse_merged
from .targets import refuse_wrapped


def set_rank(model: nn.Module, rank: int, progress: bool = False) -> nn.Module:
    """Give every adapter of the model another rank r, in place.

    A smaller rank keeps the first directions and what was trained in them. A larger one starts the
    layers again over their weights, as one batch, and adds directions whose numbers are zero: the
    model answers as before, up to the rounding of longer sums and, for QR-LoRA, of factors that are
    computed again. s stays too. All layers are checked before the first changes.

    What trains is another parameter afterwards, where its shape is another: make the optimizer
    anew.

    Parameters
    ----------
    model : nn.Module
        With adapters of QR-LoRA or LoRA-XS; before it is wrapped in DistributedDataParallel or
        sharded.
    rank : int
        At most min(N, K) of each layer. Over a weight of a smaller rank QR-LoRA has that one, as
        after :func:`adapt`.
    progress : bool
        Show a bar over the layers while they are factorised.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    TypeError, ValueError
        If no layer is adapted, one is of OHoRA, merged, or off in :func:`disabled`, something
        stands on top of it, its directions have no order (LoRA-XS with other ``vectors`` than
        "top" or a random ``basis``), or a larger start does not begin with the layer's directions:
        LoRA-XS where a randomised SVD gives other bits at another rank, any adapter over a weight
        that was cast or changed since. The message names the layer; the model is as it was.
    """
    layers = require_adapted(model)
    rank = plain_value("rank", "int", rank)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    progress = plain_value("progress", "bool", progress)
    refuse_wrapped(model, "set_rank")
    refuse_sharded(unwrapped(model), "set the rank, then call fully_shard")
    refuse_merged(layers)
    switch.check_on(layers.values(), "set_rank")
    options = {name: _options(name, layer, rank) for name, layer in layers.items()}
    follow = {name for name, layer in layers.items() if layer.rank != rank and _follows(layer)}
    again = {n: layer for n, layer in layers.items() if n in follow or rank > layer.rank}
    starts = _starts(again, options, StartRunner(progress))
    states = {
        name: _state(name, layer, rank, starts.get(name), name in follow)
        for name, layer in layers.items()
        if layer.rank != rank
    }
    for name, state in states.items():
        layer, (gate,) = layers[name], layers[name].trainables
        trains = getattr(layer, gate).requires_grad
        layer._options = options[name]  # which take_state reads
        layer.take_state(state)
        getattr(layer, gate).requires_grad_(trains)
    for name, layer in layers.items():
        layer.options = options[name]
    return model


def _options(name: str, layer: AdapterLinear, rank: int) -> Options:
    over(layer)  # that nothing stands on top of it
    require_low_rank(layer.adapter, f"{name} must be of QR-LoRA or LoRA-XS: {NO_ORDER}")
    check_nested(name, layer.options)
    return with_rank(layer.options, layer.rank, rank)


def _follows(layer: AdapterLinear) -> bool:
    """Whether the factors are what the weight and some few of their numbers give, bit for bit."""
    if not layer.adapter.rebuilt_from:
        return False
    with present(layer):
        weight = layer.base_weight
        return known_of(layer, weight).rebuilds(layer, weight)


def _starts(
    layers: Mapping[str, AdapterLinear], options: Mapping[str, Options], run: StartRunner
) -> dict[str, State]:
    """Of all ``layers`` with the same options as one batch; random numbers are left alone."""
    batches: dict[Any, dict[str, nn.Module]] = defaultdict(dict)
    for name, layer in layers.items():
        batches[layer.kind, options[name]][name] = layer
    states: dict[str, State] = {}
    with torch.random.fork_rng(devices=[]):
        for (kind, own), batch in batches.items():
            states |= start_layers(batch, adapter_type(kind), own, run)
    return states


def _state(name: str, layer: AdapterLinear, rank: int, made: State | None, follows: bool) -> State:
    """The tensors of ``layer`` at ``rank``: what a start ``made``, if it begins as the layer does.

    So factors that follow from the weight go on doing so, and a file goes without them.
    """
    adapter = require_low_rank(layer.adapter, NO_ORDER)
    (gate,) = adapter.trainables
    here, own = _held(layer), layer.rank
    if made is not None:
        new = adapter.rank(made)
        if begin_alike(adapter, here, made, min(own, new), rebuilt=follows):
            return made | {gate: resized(here[gate], new)}
    if rank < own:
        cut = first_directions(adapter, {key: here[key] for key in layer.held_factors()}, rank)
        return cut | {gate: resized(here[gate], rank)}
    raise ValueError(
        f"a start at rank {rank} must begin with the factors of {name}, got others: its weight was "
        "cast or changed since, or they come out otherwise at that rank or on this machine"
    )


def _held(layer: AdapterLinear) -> State:
    held = layer.trained_now() | layer.frozen_now()
    return {key: tensor.detach() for key, tensor in held.items()}
