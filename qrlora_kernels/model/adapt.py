"""Whole models: the matched layers become adapted ones as one batch, in place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import nn

from ..adapters import State
from ..adapters.options import Options, plain_value
from ..files import as_path
from ..linalg import StartRunner
from ..linalg.checks import check_choice
from ..nn import ADAPTERS, AdapterLinear, switch
from ..nn import quantised as few_bits
from ..nn.base_weight import is_elsewhere, is_quantised
from ..nn.become import become, restore
from ..nn.layouts import Directions
from . import advice, heads, memory, notices, tensors
from .memory import Adaptation
from .names import as_names, check_model, modules, parameters, unwrapped, within
from .targets import Targets, find_targets, refuse_wrapped
from .watch import watch

Made = tuple[Options, State]


def adapt(
    model: nn.Module,
    target_modules: Targets,
    adapter: str = "qr",
    *,
    trainable: str | Iterable[str] = (),
    skip: str | Iterable[str] = (),
    head_dtype: torch.dtype = torch.float32,
    progress: bool = True,
    cache: str | os.PathLike[str] | None = None,
    distributed: bool = True,
    prepack: bool | Directions = False,
    **options: Any,
) -> nn.Module:
    """Turn the matched linear layers into adapted ones and freeze everything else, in place.

    A layer stays the object that it is and changes its class. All weights are factorised as one
    batch before any layer changes, so an error leaves the model as it was. A further call adds to
    the first: what trains goes on training.

    Parameters
    ----------
    model : nn.Module
        Before it is wrapped in DistributedDataParallel or sharded.
    target_modules : str, compiled pattern, or list of str
        Full names or suffixes of names (``"query"``, ``"attention.self.query"``), a regular
        expression for full names, or ``"all-linear"``: every linear layer but the output embedding,
        a head that the task adds, and what ``trainable`` names.
    adapter : "qr", "lora_xs" or "ohora"
    trainable : str or iterable of str
        Modules that train in full beside the adapter, such as a task head, by name or suffix. They
        are saved with the adapter.
    skip : str or iterable of str
        Layers to leave out, by name or suffix, such as one whose start can never train.
    head_dtype : torch.dtype
        What half-precision tensors that train in full are kept in; the model computes as before.
    progress : bool
        Show a bar over the layers while they are factorised.
    cache : path, optional
        Folder of factorisations, found by the fingerprint of the weight and the options: the next
        start of the same weights reads files instead. As large as the factors; never emptied here.
    distributed : bool
        Where ``torch.distributed`` has several ranks, each factorises a share and all end with the
        same bits, of the trainables too: every rank must call ``adapt``, with the same arguments.
        False: each rank computes everything, and draws its own random numbers.
    prepack : bool, "forward" or "both"
        Call :func:`prepack` after it, ``packed`` in these directions if any is named.
    **options
        As ``from_linear`` of :class:`QRLinear`, :class:`LoRAXSLinear` or :class:`OHoRALinear`.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    TypeError, ValueError
        If nothing matches, a match cannot be adapted (quantised, meta, shared weight, ...), the
        model is wrapped already or off in :func:`disabled`, or an option is out of range; the
        message names the layer or the option. An error of one rank is raised on all.
    """
    check_model(model)
    refuse_wrapped(model)
    switch.check_on(adapted_layers(model).values(), "adapt")
    kind = adapter_type(adapter)
    opts = _options(kind, options)
    root = unwrapped(model)
    trainable, skip = as_names("trainable", trainable), as_names("skip", skip)
    if not isinstance(head_dtype, torch.dtype) or not head_dtype.is_floating_point:
        raise TypeError(f"head_dtype must be a floating torch.dtype, got {head_dtype!r}")
    progress = plain_value("progress", "bool", progress)
    distributed = plain_value("distributed", "bool", distributed)
    if not isinstance(prepack, bool):
        check_choice("prepack", prepack, ("False, True", *get_args(Directions)))
    cache = None if cache is None else as_path("cache", cache)
    apart = notices.task_head(root)

    def find() -> dict[str, nn.Module]:
        _check_named(root, "trainable", trainable)
        _check_named(root, "skip", skip)
        found = find_targets(root, target_modules, kind, trainable, apart, skip)
        _check_disjoint(root, adapted_layers(root) | found, trainable)
        return found

    run = StartRunner(progress, cache, distributed)
    layers = run.together(find)
    states = start_layers(layers, kind, opts, run)
    first = memory.recorded(root) is None
    attach(root, {name: (opts, state) for name, state in states.items()}, kind)
    if first:
        freeze_all_but_adapters(root)
    thaw(root, [n for n in parameters(root) if within(n, trainable)], head_dtype)
    advice.tell_large_factors(layers)
    if first:
        notices.tell_frozen_head(root, apart, skip)
    if isinstance(target_modules, str) and target_modules == "all-linear":
        notices.tell_passed_over(root, apart)
    watch(root)
    if prepack:
        from .prepack import prepack as let_keep  # which looks for what this module adapts

        let_keep(model, packed=None if prepack is True else prepack)
    return model


def start_layers(
    layers: dict[str, nn.Module], kind: type[AdapterLinear], options: Options, run: StartRunner
) -> dict[str, State]:
    """Of all layers as one batch, or one by one where their weights do not fit into memory, as
    dense ones of quantised layers might not.

    Ranks that share the work must agree on all options, also on those that no start sees, as a
    strength: their models would differ.
    """
    if any(is_elsewhere(layer) or is_quantised(layer) for layer in layers.values()):
        batches = [{name: layer} for name, layer in layers.items()]
    else:
        batches = [layers]
    counts = {"the number of layers": len(layers), "the number of batches": len(batches)}
    run.require_agreement(facts={"adapter": kind.kind} | counts | options.to_dict())
    states: dict[str, State] = {}
    for batch in batches:
        states |= kind.start(batch, options, run)
    return states


def _check_named(root: nn.Module, argument: str, names: Sequence[str]) -> None:
    for name in names:
        if not any(within(n, [name]) for n in parameters(root)):
            raise ValueError(f"{argument} names {name!r}, but the model has no such module")


def _check_disjoint(
    root: nn.Module, layers: Mapping[str, nn.Module], trainable: Sequence[str]
) -> None:
    """Refuse to train a weight in full that an adapter freezes, by its name or by a tie."""
    frozen = {id(layer.weight): name for name, layer in layers.items()}
    for name, parameter in parameters(root).items():
        if not within(name, trainable):
            continue
        if few_bits.is_quantised(parameter):
            raise ValueError(
                f"trainable must not reach a quantised weight, got {name}: leave it out when the "
                "model is quantised (transformers: llm_int8_skip_modules, modules_to_not_convert)"
            )
        if id(parameter) in frozen:
            raise ValueError(
                f"trainable must not reach the weight of an adapted layer, got {name}, which is "
                f"the weight of {frozen[id(parameter)]}"
            )


def adapter_type(adapter: str) -> type[AdapterLinear]:
    if not isinstance(adapter, str) or adapter not in ADAPTERS:
        raise ValueError(f"adapter must be one of {sorted(ADAPTERS)}, got {adapter!r}")
    return ADAPTERS[adapter]


def _options(kind: type[AdapterLinear], options: dict[str, Any]) -> Options:
    known = set(kind.adapter.options_type.__dataclass_fields__) - {"strength"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(
            f"adapter {kind.kind!r} takes the options {sorted(known)}, got {', '.join(unknown)}"
        )
    return kind.adapter.options_type(**options)


# --- attaching and taking off


def attach(root: nn.Module, made: dict[str, Made], kind: type[AdapterLinear]) -> None:
    """Let the named layers become adapted ones, all or none, and remember them."""
    here, first = modules(root), memory.recorded(root) is None
    record = memory.begin(root)
    asked = [(p, p.requires_grad) for p in root.parameters()]
    done: list[AdapterLinear] = []
    try:
        for name, (options, state) in made.items():
            done.append(become(here[name], kind, options, state, name))
    except BaseException:  # an interruption too: half an adaptation is none
        for layer in done:
            restore(layer)
        for parameter, trains in asked:
            parameter.requires_grad_(trains)
        if first:
            memory.forget(root)
        raise
    for name in made:
        record.layers[name] = kind.kind
        _switch_parents(here, name, record)


def freeze_all_but_adapters(root: nn.Module) -> None:
    own = {id(p) for layer in adapted_layers(root).values() for p in trained(layer)}
    for parameter in root.parameters():
        parameter.requires_grad_(id(parameter) in own)


def thaw(root: nn.Module, names: Sequence[str], dtype: torch.dtype | None) -> None:
    """Train the named parameters in full, kept in ``dtype``, if given, where half is asked for."""
    tensors.settle(root, names)
    here = parameters(root)
    for name in names:
        here[name].requires_grad_(True)
    if dtype is not None:
        own = {id(p) for layer in adapted_layers(root).values() for p in trained(layer)}
        heads.keep_wide(root, [n for n in names if id(here[n]) not in own], dtype)


def _switch_parents(here: dict[str, nn.Module], name: str, record: Adaptation) -> None:
    """Keep PyTorch's encoders off the fast path that reads a layer's weight and skips its adapter.

    These flags are what it consults to take the ordinary path.
    """
    parent, *above = _ancestors(name)
    if isinstance(here[parent], nn.TransformerEncoderLayer):
        _switch(here, parent, "activation_relu_or_gelu", 0, record)
    for ancestor in (parent, *above):
        if isinstance(here[ancestor], nn.TransformerEncoder):
            _switch(here, ancestor, "use_nested_tensor", False, record)


def _switch(
    here: dict[str, nn.Module], name: str, attribute: str, value: Any, record: Adaptation
) -> None:
    if not any(known[:2] == (name, attribute) for known in record.switches):
        record.switches.append((name, attribute, getattr(here[name], attribute)))
    setattr(here[name], attribute, value)


def _ancestors(name: str) -> list[str]:
    """The names of the modules that ``name`` lies in, the nearest first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]


# --- what is adapted


def adapted_layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """The adapted layers of ``model`` by name, without the names of wrappers around it."""
    found: dict[int, tuple[str, AdapterLinear]] = {}
    for name, module in modules(model).items():
        if isinstance(module, AdapterLinear):
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def require_adapted(model: nn.Module) -> dict[str, AdapterLinear]:
    """The adapted layers; names in a warning what was adapted and no longer is."""
    layers = adapted_layers(model)
    if not layers:
        gone = notices.lost(model)
        raise ValueError(
            f"model must hold adapted layers, got none: {gone or 'call adapt() first'}"
        )
    notices.tell_lost(model)
    return layers


def trained(layer: AdapterLinear) -> Iterator[nn.Parameter]:
    """The adapter's own parameters of one layer."""
    return (getattr(layer, name) for name in layer.trainables)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """How many numbers there are: ``adapter`` (trained by adapted layers), ``other`` (trained
    elsewhere, a task head say) and ``frozen``; a parameter used twice counts once."""
    own = {id(p) for layer in adapted_layers(model).values() for p in trained(layer)}
    counts = {"adapter": 0, "other": 0, "frozen": 0}
    for parameter in model.parameters():
        kind = "adapter" if id(parameter) in own else "other"
        which = kind if parameter.requires_grad or kind == "adapter" else "frozen"
        counts[which] += few_bits.shape_of(parameter).numel()
    return counts
