"""What a file of save_adapter holds, without the model that it belongs to."""

from __future__ import annotations

from collections.abc import Iterable

from ..model.manifest import AdapterFile
from ..model.names import under
from .beside import TO_MERGED, Heads, tell_changed
from .records import Source, Update


def of_file(file: AdapterFile) -> Source:
    """The adapter in ``file``.

    Raises
    ------
    ValueError
        If only the model knows what is missing: factors that are rebuilt from it, or the rest of a
        module of which a part trained.
    """
    updates: dict[str, Update] = {}
    for name, entry in file.layers.items():
        if not entry.stored_factors:
            raise ValueError(
                f"{file.path} rebuilds the factors of {name} from its base: load it with "
                "load_adapter and give the model, or save it with factors='stored'"
            )
        tensors = file.tensors_of(name)
        if missing := set(entry.kind.adapter.operands) - tensors.keys():
            raise ValueError(
                f"{file.path} lacks {', '.join(missing)} of {name}, which follows from its base "
                "(factors='output'): load it with load_adapter and give the model"
            )
        scaling = entry.options.scaling_of(entry.kind.adapter.rank(tensors))
        updates[name] = Update(
            entry.kind.adapter,
            tensors,
            entry.options,
            scaling * entry.options.strength,
            entry.weight["conv1d"],
        )
    tell_changed([name for name in updates if f"{name}.weight" in file.extra])
    return Source(updates, _heads(file, updates))


def _heads(file: AdapterFile, layers: Iterable[str]) -> Heads:
    heads: Heads = {}
    for name in sorted(file.thawed):
        owner, _, key = name.rpartition(".")
        if not owner or any(under(layer, [owner]) for layer in layers):
            raise ValueError(
                f"{file.path} holds {name}, and no LoRA file holds a parameter of a module with "
                f"adapted layers: load it with load_adapter and {TO_MERGED}"
            )
        heads.setdefault(owner, {})[key] = file.extra[name]
    for name in file.extra.keys() - file.thawed:
        owner, _, key = name.rpartition(".")
        if owner in heads:  # statistics of what trained
            heads[owner][key] = file.extra[name]
    for name in file.frozen or ():
        if name.rpartition(".")[0] in heads:
            raise ValueError(
                f"{file.path} holds a part of a module, without {name}: load it with load_adapter "
                "and give the model"
            )
    return heads
