"""What is exported, wherever it comes from: the updates by layer, and what trained beside them."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..adapters import AnyAdapter, Options, State
from ..bank import AdapterBank
from ..model import memory
from ..model.adapt import require_adapted, trained
from ..model.comparing import refuse_sharded
from ..model.manifest import AdapterFile, read
from ..model.names import modules, parameters, under, unwrapped
from ..model.targets import refuse_flattened
from ..nn.base_weight import is_conv1d
from ..nn.per_row import ByRow
from . import under_peft
from .beside import TO_MERGED, Heads, state_of, tell_statistics, whole_modules

UNSHARDED = "save_adapter here, and export from the model before it is sharded or wrapped"


@dataclass(frozen=True)
class Update:
    """The update of one layer.

    Attributes
    ----------
    adapter : type
        Of ``qrlora_kernels.adapters``.
    tensors : dict of Tensor
        What trains and the frozen factors.
    options : Options
    strength : float
        s in front of it, the run-time strength included.
    conv1d : bool
        Whether the layer's weight is stored as [K, N].
    tied : bool
        Whether the layer's weight is another module's too.
    """

    adapter: AnyAdapter
    tensors: State
    options: Options
    strength: float
    conv1d: bool
    tied: bool = False

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A [r, K], B [N, r]) with ΔW = B A; TypeError where there are none."""
        return self.adapter.lora_factors(self.tensors, self.options, self.strength)

    def delta(self) -> Tensor:
        """ΔW [N, K]."""
        return self.adapter.delta(self.tensors, self.options, self.strength)


@dataclass(frozen=True)
class Source:
    """An adapter to export.

    Attributes
    ----------
    updates : dict of Update
        By the names of the layers in the base.
    heads : dict of dict of Tensor
        By the name of the module, the tensors of what trained in full by their names in it.
    root : nn.Module or None
        The model, without wrappers; None where there is only a file.
    """

    updates: dict[str, Update]
    heads: Heads = field(default_factory=dict)
    root: nn.Module | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Those of the base by name, without what lies inside an adapted layer."""
        if self.root is None:
            return {}
        here = modules(self.root)
        return {n: m for n, m in here.items() if n in self.updates or not under(n, [*self.updates])}

    @property
    def base_name(self) -> str | None:
        """Where the base came from, if the model says so."""
        return getattr(getattr(self.root, "config", None), "_name_or_path", None) or None


def source_of(given: Any, adapter: str | None) -> Source:
    """The adapter in a model, a bank or a file.

    Parameters
    ----------
    given : nn.Module, AdapterBank, str or path
    adapter : str or None
        Which one, where several have names.

    Raises
    ------
    TypeError, ValueError
        If there is none, or it cannot be told which; if the model is sharded.
    """
    if adapter is not None and not isinstance(adapter, str):
        raise TypeError(f"adapter must be a name, got {type(adapter).__name__}")
    if isinstance(given, AdapterBank):
        return _of_bank(given, adapter)
    if isinstance(given, (str, os.PathLike)):
        _refuse_name(adapter, "a file")
        return _of_file(read(given))
    refuse_flattened(given, UNSHARDED)
    root = unwrapped(given)
    refuse_sharded(root, UNSHARDED)
    if under_peft.holds(root):
        return _of_peft(root, adapter)
    _refuse_name(adapter, "a model that adapt made")
    return _of_model(root)


def _refuse_name(adapter: str | None, of: str) -> None:
    if adapter is not None:
        raise ValueError(f"adapter must be None for {of}, which holds one, got {adapter!r}")


# --- a model that adapt or load_adapter made


def _of_model(root: nn.Module) -> Source:
    layers = require_adapted(root)
    under_peft.refuse_others(root)
    _refuse_shared(root, layers)
    known = owners(root)
    updates = {
        name: Update(
            layer.adapter,
            layer._tensors(),
            layer.options,
            layer._strength,
            layer.conv1d,
            known[id(layer.base_weight)] > (0 if layer.merged else 1),
        )
        for name, layer in layers.items()
    }
    _tell_changed([name for name, layer in layers.items() if layer.base_changed()])
    own = {id(p) for layer in layers.values() for p in trained(layer)}
    own |= {id(layer.weight) for layer in layers.values()}
    record = memory.recorded(root)
    brought = set() if record is None else record.replaced.keys()
    in_full = [
        name
        for name, p in parameters(root).items()
        if id(p) not in own and (p.requires_grad or name in brought)
    ]
    heads = {name: state_of(root, name) for name in whole_modules(root, in_full, updates)}
    tell_statistics(root, heads)
    return Source(updates, heads, root)


def owners(root: nn.Module) -> Counter[int]:
    """How many modules have each parameter."""
    return Counter(id(p) for m in root.modules() for p in m._parameters.values() if p is not None)


def _refuse_shared(root: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    names = {id(layer): name for name, layer in layers.items()}
    for other, module in modules(root).items():
        if id(module) in names and other != names[id(module)]:
            raise ValueError(
                f"{names[id(module)]} and {other} are one module, and loaders put an adapter on "
                f"one of the two: {TO_MERGED}"
            )


def _tell_changed(layers: list[str]) -> None:
    if layers:
        warnings.warn(
            f"the base weights of {', '.join(layers)} were changed after their adapters began; the "
            "file belongs over the weights that the model has now",
            stacklevel=5,
        )


# --- under PEFT


def _of_peft(root: nn.Module, adapter: str | None) -> Source:
    base = under_peft.base_of(root)
    name = under_peft.chosen(root, adapter)
    wrapped = under_peft.heads_of(base, name)
    under_peft.refuse_others(base)
    here = modules(base)
    layers: dict[str, Any] = under_peft.layers_of(base, name)
    known = owners(base)
    updates: dict[str, Update] = {}
    for layer_name, layer in layers.items():
        layer.compare(name)  # that it was loaded over its base
        linear = layer.get_base_layer()
        updates[layer_name] = Update(
            layer.adapter,
            layer.tensors(name),
            layer.options[name],
            layer.scaling[name],
            is_conv1d(linear),
            known[id(linear.weight)] > 1,
        )
    taken = [*wrapped, *(n for n, m in here.items() if isinstance(m, ByRow))]
    in_full = [n for n, p in parameters(base).items() if p.requires_grad and not under(n, taken)]
    in_full += [n for n in under_peft.trained_inside(base) if n not in in_full]
    heads = {n: state_of(base, n) for n in whole_modules(base, in_full, updates)}
    return Source(updates, heads | wrapped, base)


# --- one adapter of a bank


def _of_bank(bank: AdapterBank, adapter: str | None) -> Source:
    if adapter is None:
        raise ValueError(f"adapter must name one of the bank, got None of {bank.names()[:5]}")
    source = source_of(bank.model, None)
    state = {under_peft.plain_name(name): t for name, t in bank.state(adapter).items()}
    updates = {
        name: replace(
            update, tensors={k: state.pop(f"{name}.{k}", t) for k, t in update.tensors.items()}
        )
        for name, update in source.updates.items()
    }
    heads = dict(source.heads)
    for name, tensor in state.items():
        owner = _head_of(name, heads)
        assert source.root is not None
        held = heads.get(owner) or state_of(source.root, owner)
        heads[owner] = held | {name.removeprefix(f"{owner}."): tensor}
    return Source(updates, heads, source.root)


def _head_of(name: str, heads: Iterable[str]) -> str:
    """The head that the tensor ``name`` lies in, else the module that owns it."""
    return next((head for head in heads if under(name, [head])), name.rpartition(".")[0])


# --- a file


def _of_file(file: AdapterFile) -> Source:
    updates: dict[str, Update] = {}
    for name, entry in file.layers.items():
        if not entry.stored_factors:
            raise ValueError(
                f"{file.path} rebuilds the factors of {name} from its base: load it with "
                "load_adapter and give the model, or save it with factors='stored'"
            )
        tensors = file.tensors_of(name)
        scaling = entry.options.scaling_of(entry.kind.adapter.rank(tensors))
        updates[name] = Update(
            entry.kind.adapter,
            tensors,
            entry.options,
            scaling * entry.options.strength,
            entry.weight["conv1d"],
        )
    return Source(updates, _heads_in(file, updates))


def _heads_in(file: AdapterFile, layers: Mapping[str, Update]) -> Heads:
    heads: Heads = {}
    for name in sorted(file.thawed):
        owner, _, key = name.rpartition(".")
        if any(under(layer, [owner]) for layer in layers) or not owner:
            raise ValueError(
                f"{file.path} holds {name}, and no LoRA file holds a parameter of a module with "
                f"adapted layers: load it with load_adapter and {TO_MERGED}"
            )
        heads.setdefault(owner, {})[key] = file.extra[name]
    for name in file.extra.keys() - file.thawed:
        owner, _, key = name.rpartition(".")
        if owner in heads:  # statistics of what trained
            heads[owner][key] = file.extra[name]
    return heads
