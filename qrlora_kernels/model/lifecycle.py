"""Merge, unmerge, take off, start again: all layers of a model or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..adapters import State
from ..adapters.options import plain_value
from ..linalg import StartRunner
from ..nn import AdapterLinear, base_weight, merging, offload, switch
from ..nn.base_weight import present, put
from ..nn.become import over, restore
from . import heads, memory, tensors, watch
from .adapt import require_adapted
from .memory import Adaptation
from .names import modules, named_tensors, parameters, unwrapped


def merge(model: nn.Module, dequantize: bool | torch.dtype = False) -> nn.Module:
    """Merge every adapted layer; see :meth:`AdapterLinear.merge`.

    Saving the model then saves a plain one. ``unmerge`` goes back, ``unload`` takes the adapters
    off for good.

    Parameters
    ----------
    model : nn.Module
    dequantize : bool or torch.dtype
        Let quantised layers hold the dense merged weight, in this dtype, or with True in that of
        the weight that was quantised.

    Raises
    ------
    ValueError
        If no layer is adapted, a weight is quantised and ``dequantize`` is not asked for, a layer's
        weight is tied to another module's, computed anew at every forward (pruning,
        parametrisations) or spread over ranks by ``fully_shard``, a merged weight would not be
        finite, or the adapters are off in :func:`disabled`. The message names the layer and every
        weight is as it was.
    """
    layers = require_adapted(model)
    _check_owners(model, layers)
    done: list[AdapterLinear] = []
    for name, layer in layers.items():
        already = layer.merged
        try:
            with named(name):
                layer.merge(dequantize)
        except ValueError:
            for one in done:
                one.unmerge()
            raise
        done += [] if already else [layer]
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put every original weight back, bit for bit."""
    for layer in require_adapted(model).values():
        layer.unmerge()
    return model


def unload(
    model: nn.Module, merge: bool = True, dequantize: bool | torch.dtype = False
) -> nn.Module:
    """Take every adapter off: with the update merged in, or to what the model was before.

    The layers get their classes back, and parameters ask for a gradient that did before ``adapt``.
    Without ``merge``, what an adapter file overwrote, such as a task head, comes back too; with it
    the file's stays, since the model is to answer as the adapted one did. A quantised layer that is
    merged with ``dequantize``, see :func:`merge`, becomes an ``nn.Linear``.

    Raises
    ------
    TypeError, ValueError
        As :func:`merge`, or if something stands on top of an adapted layer. Nothing has changed.
    """
    merge = plain_value("merge", "bool", merge)
    layers = require_adapted(model)
    for layer in layers.values():
        over(layer)
    if merge:
        switch.check_on(layers.values(), "unload with merge=True")
        _check_owners(model, layers)
        for name, layer in layers.items():
            with named(name):
                merging.refuse_spread(layer)
                # That it can be done, before anything changes.
                merging.merged_parameter(layer, dequantize)
    root, record = unwrapped(model), memory.begin(model)
    for layer in layers.values():
        weight = merging.merged_parameter(layer, dequantize) if merge else layer.base_weight
        layer.unmerge()
        restore(layer)
        if merge:
            put(layer, weight)
    _put_back(root, record, replaced=not merge)
    memory.forget(root)
    return model


def _put_back(root: nn.Module, record: Adaptation, replaced: bool) -> None:
    watch.stop(root)
    watch.forget_loads(root)
    heads.put_back(root)
    if replaced:
        put_replaced_back(root, record)
    here = modules(root)
    for name, attribute, value in reversed(record.switches):
        if name in here:
            setattr(here[name], attribute, value)
    for module in root.modules():
        offload.widen(module)
    for name, parameter in parameters(root).items():
        if name in record.trained_before:
            parameter.requires_grad_(record.trained_before[name])


def put_replaced_back(root: nn.Module, record: Adaptation, but: Collection[str] = ()) -> None:
    """Put back what adapter files overwrote outside the adapters, save what is named in ``but``.

    What trained because of them alone trains no more.
    """
    here = named_tensors(root)
    going = [name for name in record.replaced if name not in but]
    for name in record.thawed.intersection(going).intersection(here):
        here[name].requires_grad_(False)
    heads.release(root)
    for name in going:
        tensor = record.replaced.pop(name)
        if name in here and here[name].shape == tensor.shape:
            tensors.put(root, name, tensor)
    record.thawed.intersection_update(but)


def _check_owners(model: nn.Module, layers: dict[str, AdapterLinear]) -> None:
    """Refuse to merge into a weight that another module owns too, or that is computed anew."""
    owners: dict[int, list[str]] = defaultdict(list)
    names = {id(m): name for name, m in reversed(modules(model).items())}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                owners[id(p)].append(f"{names[id(module)]}.{key}")
    for name, layer in layers.items():
        if not layer.merged:
            with named(name):
                merging.require_stored_weight(layer)
        others = [n for n in owners[id(layer.base_weight)] if n != f"{name}.weight"]
        if others and not layer.merged:
            raise ValueError(
                f"{name}.weight must belong to {name} alone to be merged, but it is tied to "
                f"{', '.join(others)}: untie them first, or keep the adapter apart (save_adapter)"
            )


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the layer's name in front of what a ValueError inside says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def refresh(model: nn.Module, progress: bool = False) -> nn.Module:
    """Start the adapters again from the weights that are there now.

    For a checkpoint that was loaded after ``adapt``: factors of the weights from before would be no
    factors of these. What was trained in the adapters is lost. An optimizer goes on with their
    parameters, save where a rule chooses another rank than before.

    Parameters
    ----------
    model : nn.Module
    progress : bool
        Show a bar over the layers.

    Raises
    ------
    ValueError
        If no layer is adapted, or a start fails; the model is as it was.
    """
    progress = plain_value("progress", "bool", progress)
    layers = require_adapted(model)
    states: dict[str, State] = {}
    for name, layer in layers.items():
        states |= layer.start({name: layer}, layer.options, StartRunner(progress))
    for name, layer in layers.items():
        layer.unmerge()
        layer.take_state(states[name])
        with present(layer):
            layer._start = base_weight.digest(layer)
    watch.watch(unwrapped(model))
    return model
