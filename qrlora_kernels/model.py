"""Whole models: adapt the matched layers as one batch, merge, take off, summarise."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .linalg import StartRunner
from .matching import Targets, find_targets, within
from .nn import ADAPTERS, AdapterLinear
from .nn.base import Options


def adapt(
    model: nn.Module,
    target_modules: Targets,
    adapter: str = "qr",
    *,
    trainable: str | Sequence[str] = (),
    progress: bool = True,
    cache: str | os.PathLike[str] | None = None,
    distributed: bool = True,
    **options: Any,
) -> nn.Module:
    """Swap the matched linear layers for adapted ones and freeze everything else, in place.

    All weights are factorised as one batch before anything is swapped, so an error leaves the model
    as it was.

    Parameters
    ----------
    model : nn.Module
    target_modules : str, compiled pattern, or list of str
        Full names or suffixes of names (``"query"``, ``"attention.self.query"``), a regular
        expression for full names, or ``"all-linear"``: every linear layer but the output embedding
        and what ``trainable`` names.
    adapter : "qr", "lora_xs" or "ohora"
    trainable : str or list of str
        Modules that train in full beside the adapter, such as a task head, by name or suffix. They
        are saved with the adapter.
    progress : bool
        Show a bar over the layers while they are factorised.
    cache : path, optional
        Folder of factorisations, found by the fingerprint of the weight and the options: the next
        start of the same weights reads files instead. As large as the factors; never emptied here.
    distributed : bool
        Where ``torch.distributed`` has several ranks, each factorises a share and all end with the
        same bits, of the trainables too: every rank must call ``adapt``, with the same arguments.
        False: each rank computes everything, and draws its own random numbers.
    **options
        As ``from_linear`` of :class:`QRLinear`, :class:`LoRAXSLinear` or :class:`OHoRALinear`.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    TypeError, ValueError
        If nothing matches, a match cannot be adapted (quantised, meta, shared weight, ...) or an
        option is out of range; the message names the layer or the option. An error of one rank is
        raised on all.
    """
    kind = adapter_type(adapter)
    opts = _options(kind, options)
    if isinstance(trainable, str):
        trainable = [trainable]
    for name in trainable:
        if not any(within(n, [name]) for n, _ in model.named_parameters()):
            raise ValueError(f"trainable names {name!r}, but the model has no such module")
    layers = find_targets(model, target_modules, exclude=trainable)
    _check_disjoint(model, layers, trainable)
    matrices = kind.start_matrices(layers, opts)
    states = kind.start_named(matrices, opts, StartRunner(progress, cache, distributed))
    adapted = zip(layers.items(), states, strict=True)
    install(model, {name: kind.from_state(base, opts, state) for (name, base), state in adapted})
    for name, parameter in model.named_parameters():
        if within(name, trainable):
            parameter.requires_grad_(True)
    return model


def _check_disjoint(
    model: nn.Module, layers: dict[str, nn.Module], trainable: Sequence[str]
) -> None:
    """Refuse to train a weight in full that an adapter freezes, by its name or by a tie."""
    frozen = {id(layer.weight): name for name, layer in layers.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if within(name, trainable) and id(parameter) in frozen:
            raise ValueError(
                f"trainable must not reach the weight of an adapted layer, got {name}, which is "
                f"the weight of {frozen[id(parameter)]}"
            )


def adapter_type(adapter: str) -> type[AdapterLinear]:
    if adapter not in ADAPTERS:
        raise ValueError(f"adapter must be one of {sorted(ADAPTERS)}, got {adapter!r}")
    return ADAPTERS[adapter]


def _options(kind: type[AdapterLinear], options: dict[str, Any]) -> Options:
    known = kind.options_type.__dataclass_fields__
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"adapter {kind.kind!r} takes the options {sorted(known)}, got {', '.join(unknown)}"
        )
    return kind.options_type(**options)


def install(model: nn.Module, layers: dict[str, AdapterLinear]) -> None:
    """Put adapted layers in place and freeze all but the parameters of adapted layers."""
    for name, layer in layers.items():
        replace_module(model, name, layer)
    own = {id(p) for layer in adapted_layers(model).values() for p in trained(layer)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule called ``name``."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    owner._modules[leaf] = module
    if isinstance(owner, nn.TransformerEncoderLayer):
        # Its inference fast path reads the weights of linear1 and linear2 and would skip the
        # adapter; this flag is what it consults to take the ordinary path.
        owner.activation_relu_or_gelu = 0
    for module in _ancestors(model, name):
        if isinstance(module, nn.TransformerEncoder):
            # It would hand the layers a nested tensor, for that same fast path.
            module.use_nested_tensor = False


def _ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    parts = name.split(".")
    return (model.get_submodule(".".join(parts[:i])) for i in range(len(parts)))


def adapted_layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """The adapted layers of ``model`` by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdapterLinear)}


def require_adapted(model: nn.Module) -> dict[str, AdapterLinear]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model must hold adapted layers, got none: call adapt() first")
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
        counts[kind if parameter.requires_grad or kind == "adapter" else "frozen"] += (
            parameter.numel()
        )
    return counts


def merge(model: nn.Module) -> nn.Module:
    """Merge every adapted layer; see :meth:`AdapterLinear.merge`. Raises ValueError if none is."""
    for layer in require_adapted(model).values():
        layer.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put every original weight back, bit for bit."""
    for layer in require_adapted(model).values():
        layer.unmerge()
    return model


def unload(model: nn.Module, merge: bool = True) -> nn.Module:
    """Swap every adapted layer for a plain one: with the update merged in, or as it first was."""
    for name, layer in require_adapted(model).items():
        replace_module(model, name, layer.to_linear(merge))
    return model
