"""Which layers of a model to adapt: names, suffixes, a regular expression or "all-linear"."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..nn import AdapterLinear
from ..nn.base_weight import is_linear_like
from ..nn.become import check_can_become
from .names import canonical, check_model, parameters, under, within
from .names import modules as modules_of

Targets = str | re.Pattern[str] | Iterable[str]

# Parents that read the weight of a layer and never call it, so that an adapter there is dead.
BYPASSING: dict[str, tuple[str, ...]] = {
    "nn.MultiheadAttention": ("out_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def refuse_wrapped(model: nn.Module, doing: str = "adapt") -> None:
    """Raise where new parameters would not be trained as the others are."""
    check_model(model)
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"{doing} must not be called under torch.inference_mode: nothing would train"
        )
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "model must not be in DistributedDataParallel yet, which averages the gradients of "
                "the parameters that it knew at first: adapt the model, then wrap it"
            )
    refuse_flattened(model)
    lazy = [name for name, p in parameters(model).items() if is_lazy(p)]
    if lazy:
        raise ValueError(f"model must have all its weights, got none yet in {', '.join(lazy)}")
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            "model must not be loaded under torch.inference_mode: its tensors never train"
        )


def refuse_flattened(
    model: nn.Module, way_out: str = "adapt the model or load the adapter, then wrap it"
) -> None:
    """Raise where FSDP1 has put parameters into flat ones, which no name or shape fits."""
    check_model(model)
    for module in model.modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                "model must not be in FullyShardedDataParallel here, which flattens its "
                f"parameters: {way_out}"
            )


def find_targets(
    model: nn.Module,
    targets: Targets,
    adapter: type[AdapterLinear],
    exclude: Sequence[str] = (),
    apart: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> dict[str, nn.Module]:
    """The layers of ``model`` that ``targets`` names, each checked, in the model's order.

    Parameters
    ----------
    model : nn.Module
    targets : str, compiled pattern, or iterable of str
    adapter : type
        The class that they will become.
    exclude : sequence of str
        What "all-linear" leaves out, by name or suffix.
    apart : sequence of str
        What "all-linear" leaves out, by full name.
    skip : sequence of str
        What is left out, however it was matched.

    Raises
    ------
    TypeError
        If a named module is not a layer that can be adapted.
    ValueError
        If nothing matches, two matches share a weight, or the parent bypasses the layer's forward.
    """
    modules = modules_of(model)
    if isinstance(targets, str) and targets == "all-linear":
        found = [n for n in _all_linear(model, modules, exclude) if not under(n, apart)]
    else:
        found = _matched(modules, targets)
    names = [n for n in found if not within(n, skip)]
    if found and not names:
        raise ValueError(f"skip must leave a layer to adapt, got {list(skip)}, which are all")
    if not names:
        raise ValueError(_no_match(targets, modules))
    layers = {name: modules[name] for name in _first_names(names, modules)}
    _check(modules, layers, adapter)
    return layers


def _matched(modules: dict[str, nn.Module], targets: Targets) -> list[str]:
    if isinstance(targets, re.Pattern):
        return [n for n, m in modules.items() if is_linear_like(m) and targets.fullmatch(n)]
    if isinstance(targets, str):
        return _by_name(modules, targets) or _by_expression(modules, targets)
    if not isinstance(targets, Iterable):
        raise TypeError(
            "target_modules must be a string, a compiled pattern or a list of strings, got "
            f"{type(targets).__name__}"
        )
    wanted = [(t, _by_name(modules, t)) for t in targets]
    missing = [t for t, found in wanted if not found]
    if missing:
        raise ValueError(_no_match(missing, modules))
    chosen = {n for _, found in wanted for n in found}
    return [n for n in modules if n in chosen]


def _first_names(names: Sequence[str], modules: dict[str, nn.Module]) -> list[str]:
    """Without further names of a module that is there already."""
    return list({id(modules[name]): name for name in reversed(names)}.values())[::-1]


def _by_name(modules: dict[str, nn.Module], target: str) -> list[str]:
    """Modules whose full name is ``target`` or ends in ``.target``."""
    if not isinstance(target, str):
        raise TypeError(f"target_modules must hold strings, got {type(target).__name__}")
    target = canonical(target) or target
    return [n for n in modules if n and (n == target or n.endswith("." + target))]


def _by_expression(modules: dict[str, nn.Module], expression: str) -> list[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"target_modules matches no name and is no regular expression ({error}): {expression!r}"
        ) from None
    return [n for n, m in modules.items() if is_linear_like(m) and pattern.fullmatch(n)]


def _all_linear(
    model: nn.Module, modules: dict[str, nn.Module], exclude: Sequence[str]
) -> list[str]:
    """Every plain linear layer but the output embedding, what is excluded, and what is bypassed."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in modules.items()
        if name
        and is_linear_like(module)
        and module is not output
        and not isinstance(module, AdapterLinear)
        and not within(name, exclude)
        and not bypassed(name, modules)
    ]


def bypassed(name: str, modules: dict[str, nn.Module]) -> str:
    """The class of the parent that reads the layer's weight and never calls it; empty if none."""
    parent, _, leaf = name.rpartition(".")
    for kind in type(modules.get(parent)).__mro__:
        name = "nn.MultiheadAttention" if kind is nn.MultiheadAttention else kind.__name__
        if leaf in BYPASSING.get(name, ()):
            return name
    return ""


def _check(
    modules: dict[str, nn.Module], layers: dict[str, nn.Module], adapter: type[AdapterLinear]
) -> None:
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        if isinstance(layer, AdapterLinear):
            raise ValueError(f"{name} is adapted already, with {type(layer).__name__}")
        if not name:
            raise ValueError("model must contain the target layers, got the bare layer itself")
        check_can_become(layer, adapter, name)
        parent = bypassed(name, modules)
        if parent:
            raise ValueError(
                f"{name} belongs to an {parent}, which reads its weight and never calls it: an "
                "adapter there would have no effect"
            )
        owner = owners.setdefault(id(layer.weight), name)
        if owner != name:
            raise ValueError(f"{name} and {owner} share one weight; adapt at most one of them")


def _no_match(targets: object, modules: dict[str, nn.Module]) -> str:
    leaves = Counter(n.rpartition(".")[2] for n, m in modules.items() if n and is_linear_like(m))
    known = ", ".join(f"{name} ({count})" for name, count in leaves.most_common(12))
    return f"target_modules {targets!r} matches no module; linear layers here: {known or 'none'}"
