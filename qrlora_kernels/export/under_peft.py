"""A model under PEFT, told by what its modules have: PEFT need not be there."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model.names import modules, under
from ..nn import AdapterLinear
from ..nn.per_row import ByRow
from .beside import Heads

PREFIX = "base_model.model."


def holds(root: nn.Module) -> bool:
    """Whether layers of ours stand in ``root`` as PEFT puts them there."""
    return any(_is_layer(module) for module in root.modules())


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, ByRow) and not isinstance(module, AdapterLinear)


def base_of(root: nn.Module) -> nn.Module:
    """The model that PEFT was put on: inside a ``PeftModel``, else ``root`` itself."""
    inside = getattr(root, "get_base_model", None)
    found: nn.Module = root if inside is None else inside()
    return found


def chosen(root: nn.Module, adapter: str | None) -> str:
    """The adapter called ``adapter``, by default the one that is active.

    Raises
    ------
    ValueError
        If there is no such one, or several are active.
    """
    layers: list[Any] = [module for module in root.modules() if _is_layer(module)]
    known = list(dict.fromkeys(name for layer in layers for name in layer.r))
    if adapter is None:
        active = [n for n in known if any(n in layer.active_adapters for layer in layers)]
        if len(active) != 1:
            raise ValueError(
                f"adapter must name one where not exactly one is active, got None and {active}"
            )
        return active[0]
    if adapter not in known:
        raise ValueError(f"adapter must be one of {known}, got {adapter!r}")
    return adapter


def layers_of(base: nn.Module, adapter: str) -> dict[str, Any]:
    """Our layers that have the adapter, by their names in the base."""
    found: dict[int, tuple[str, Any]] = {}
    for name, module in modules(base).items():
        layer: Any = module
        if _is_layer(module) and layer.has(adapter):
            found.setdefault(id(module), (name, layer))
    return dict(found.values())


def refuse_others(root: nn.Module) -> None:
    """Raise where another method's adapter counts too, which the file would not hold."""
    for name, module in modules(root).items():
        if _kind_of(module, "BaseTunerLayer") and not isinstance(module, ByRow):
            raise ValueError(
                f"model must hold adapters of this package alone, got {type(module).__name__} at "
                f"{name}: export that one with its own library, or merge it first"
            )


def heads_of(base: nn.Module, adapter: str) -> Heads:
    """What the adapter has in full, by the names of the modules in the base.

    Raises
    ------
    ValueError
        If it trains rows of an embedding, for which a LoRA file has no common form.
    """
    heads: Heads = {}
    for name, module in modules(base).items():
        if not _kind_of(module, "AuxiliaryTrainingWrapper"):
            continue
        if not _kind_of(module, "ModulesToSaveWrapper"):
            raise ValueError(
                f"{name} trains single tokens (trainable_token_indices), and no server but PEFT "
                "reads them: merge_and_unload the model and save it"
            )
        wrapper: Any = module
        if adapter in wrapper.modules_to_save:
            held: nn.Module = wrapper.modules_to_save[adapter]
            heads[name] = {n: t.detach() for n, t in held.state_dict().items()}
    return heads


def trained_inside(base: nn.Module) -> list[str]:
    """What trains of the layers below our adapters: biases."""
    return [
        f"{name}.{key}"
        for name, module in modules(base).items()
        if _is_layer(module)
        for key, p in module.named_parameters()
        if p.requires_grad and under(key, ["base_layer"])
    ]


def plain_name(name: str) -> str:
    """A tensor's name in a model under PEFT, without what PEFT adds."""
    parts = name.removeprefix(PREFIX).split(".")
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        del parts[at : at + 2]
    return ".".join(parts)


def _kind_of(module: nn.Module, kind: str) -> bool:
    return any(one.__name__ == kind for one in type(module).__mro__)
