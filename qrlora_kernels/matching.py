"""Which layers of a model to adapt: names, suffixes, a regular expression or "all-linear"."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from .nn import AdapterLinear
from .nn.frozen import check_base, is_linear_like

Targets = str | re.Pattern[str] | Sequence[str]


def find_targets(
    model: nn.Module, targets: Targets, exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The layers of ``model`` that ``targets`` names, each checked, in the model's order.

    Raises
    ------
    TypeError
        If a named module is not a layer that can be adapted.
    ValueError
        If nothing matches, a module is reached twice, two matches share a weight, or the parent
        bypasses the layer's forward.
    """
    modules = dict(model.named_modules())
    if isinstance(targets, str) and targets == "all-linear":
        names = _all_linear(model, modules, exclude)
    elif isinstance(targets, re.Pattern):
        names = [n for n, m in modules.items() if is_linear_like(m) and targets.fullmatch(n)]
    elif isinstance(targets, str):
        names = _by_name(modules, targets) or _by_expression(modules, targets)
    elif isinstance(targets, Iterable):
        wanted = [(t, _by_name(modules, t)) for t in targets]
        missing = [t for t, found in wanted if not found]
        if missing:
            raise ValueError(_no_match(missing, modules))
        chosen = {n for _, found in wanted for n in found}
        names = [n for n in modules if n in chosen]
    else:
        raise TypeError(
            "target_modules must be a string, a compiled pattern or a list of strings, got "
            f"{type(targets).__name__}"
        )
    if not names:
        raise ValueError(_no_match(targets, modules))
    layers = {name: modules[name] for name in names}
    _check(model, modules, layers)
    return layers


def _by_name(modules: dict[str, nn.Module], target: str) -> list[str]:
    """Modules whose full name is ``target`` or ends in ``.target``."""
    if not isinstance(target, str):
        raise TypeError(f"target_modules must hold strings, got {type(target).__name__}")
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
        and not _bypassed(name, modules)
    ]


def within(name: str, prefixes: Sequence[str]) -> bool:
    """Whether ``name`` lies in one of the named modules (full name or suffix of a path)."""
    return any(f".{prefix}." in f".{name}." for prefix in prefixes)


def _bypassed(name: str, modules: dict[str, nn.Module]) -> bool:
    """nn.MultiheadAttention reads the weight of its out_proj and never calls its forward."""
    parent = modules.get(name.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention)


def _check(model: nn.Module, modules: dict[str, nn.Module], layers: dict[str, nn.Module]) -> None:
    reached = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        if isinstance(layer, AdapterLinear):
            raise ValueError(f"{name} is adapted already, with {type(layer).__name__}")
        if not name:
            raise ValueError("model must contain the target layers, got the bare layer itself")
        check_base(layer, name)
        if reached[id(layer)] > 1:
            raise ValueError(f"{name} is one module used in several places; adapt it by hand")
        if _bypassed(name, modules):
            raise ValueError(
                f"{name} belongs to an nn.MultiheadAttention, which reads its weight and never "
                "calls it: an adapter there would have no effect"
            )
        owner = owners.setdefault(id(layer.weight), name)
        if owner != name:
            raise ValueError(f"{name} and {owner} share one weight; adapt at most one of them")


def _no_match(targets: object, modules: dict[str, nn.Module]) -> str:
    leaves = Counter(n.rpartition(".")[2] for n, m in modules.items() if n and is_linear_like(m))
    known = ", ".join(f"{name} ({count})" for name, count in leaves.most_common(12))
    return f"target_modules {targets!r} matches no module; linear layers here: {known or 'none'}"
