"""What a model remembers of its adaptation, on the model itself and in no file.

Which layers were adapted and how, what trained before, what trains beside the adapter, and what an
adapter file overwrote. From it a second ``adapt`` adds to the first, ``unload`` puts everything
back, and a layer that another library replaced since is missed by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..nn import AdapterLinear
from .names import canonical, modules, parameters, unwrapped

ATTRIBUTE = "_qrlora_adaptation"


@dataclass
class Adaptation:
    """Names are canonical, see :mod:`.names`.

    Attributes
    ----------
    layers : dict
        The kind of adapter of each layer that was adapted, by the first of its names.
    trained_before : dict
        Whether each parameter required a gradient when the first adapter came.
    replaced : dict
        What an adapter file overwrote outside the adapters, as it was before the first file.
    thawed : set
        What an adapter file made trainable and did not train before.
    switches : list of (module name, attribute, value)
        What was set on the parents of layers, as it was before.
    """

    layers: dict[str, str] = field(default_factory=dict)
    trained_before: dict[str, bool] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    thawed: set[str] = field(default_factory=set)
    switches: list[tuple[str, str, Any]] = field(default_factory=list)

    def prefixed(self, prefix: str) -> Adaptation:
        """The same as seen from a module that holds this one as ``prefix``."""

        def full(name: str) -> str:
            return f"{prefix}.{name}" if name else prefix

        def named(values: dict[str, Any]) -> dict[str, Any]:
            return {full(name): v for name, v in values.items()}

        return Adaptation(
            named(self.layers),
            named(self.trained_before),
            named(self.replaced),
            {full(name) for name in self.thawed},
            [(full(name), *rest) for name, *rest in self.switches],
        )

    def join(self, other: Adaptation) -> None:
        """Add what ``other`` remembers and this one, which is the earlier, does not."""
        self.layers = other.layers | self.layers
        self.trained_before = other.trained_before | self.trained_before
        self.replaced = other.replaced | self.replaced
        self.thawed |= other.thawed
        self.switches += other.switches


def recorded(model: nn.Module) -> Adaptation | None:
    """What the model and its parts remember, under the names of ``model``; None if nothing."""
    parts = list(_parts(unwrapped(model)))
    if not parts:
        return None
    whole = Adaptation()
    for prefix, adaptation in parts:
        whole.join(adaptation.prefixed(prefix) if prefix else adaptation)
    return whole


def begin(model: nn.Module) -> Adaptation:
    """The record on ``model`` to write to, with what its parts remember; made at the first call."""
    root = unwrapped(model)
    parts = dict(_parts(root))
    if set(parts) == {""}:
        whole = parts[""]  # the same object for every caller
    else:
        whole = recorded(root) or Adaptation()
        forget(root)
        vars(root)[ATTRIBUTE] = whole
    for name, p in parameters(root).items():
        whole.trained_before.setdefault(name, p.requires_grad)
    return whole


def forget(model: nn.Module) -> None:
    """Drop the record on the model and on its parts."""
    for module in unwrapped(model).modules():
        vars(module).pop(ATTRIBUTE, None)


def _parts(root: nn.Module) -> Iterator[tuple[str, Adaptation]]:
    for name, module in root.named_modules():
        adaptation = vars(module).get(ATTRIBUTE)
        if adaptation is not None:
            yield canonical(name), adaptation


def lost(model: nn.Module) -> list[str]:
    """Layers that were adapted and no longer are: something put another module there since."""
    whole = recorded(model)
    if whole is None:
        return []
    now = modules(model)
    return [name for name in whole.layers if name not in now or not _holds_adapted(now[name])]


def _holds_adapted(module: nn.Module) -> bool:
    """Whether it is an adapted layer or what another library put around one."""
    return any(isinstance(inner, AdapterLinear) for inner in module.modules())
