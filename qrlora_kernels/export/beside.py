"""What trained in full beside the adapters: whole modules in a LoRA folder, or a refusal."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..adapters import State
from ..model.names import buffers, parameters, under
from ..model.tensors import values_of
from ..nn.base_weight import whole

Heads = dict[str, State]  # by module, its tensors by their names in it
TO_MERGED = "write the merged model with qk.to_merged"


def whole_modules(root: nn.Module, in_full: Iterable[str], layers: Iterable[str]) -> list[str]:
    """The modules that hold the parameters ``in_full``, as large as may be.

    Raises
    ------
    ValueError
        If one holds an adapted layer too, or is one: a bias, say.
    """
    wanted, everything, layers = set(in_full), list(parameters(root)), list(layers)
    found: list[str] = []
    for name in in_full:
        owner = name.rpartition(".")[0]
        inside = [n for n in layers if not owner or under(n, [owner]) or under(owner, [n])]
        if inside:
            raise ValueError(
                f"{name} was trained in full, and no LoRA file holds a parameter of a module with "
                f"adapted layers ({inside[0]}): {TO_MERGED}"
            )
        while parent := owner.rpartition(".")[0]:
            if not all(n in wanted for n in everything if under(n, [parent])):
                break
            owner = parent
        found.append(owner)
    return [n for n in dict.fromkeys(found) if not under(n.rpartition(".")[0], found)]


def state_of(root: nn.Module, name: str) -> State:
    """The tensors of the module called ``name``, by their names in it."""
    held = {**buffers(root), **parameters(root)}
    of_module = {n: t for n, t in held.items() if under(n, [name])}
    for key, tensor in of_module.items():
        refuse_sparse(key, tensor)
    values = values_of(root, of_module).items()
    return {n.removeprefix(f"{name}."): whole(t) for n, t in values}


def refuse_sparse(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise ValueError(
            f"{name} must be dense to be written, got layout {tensor.layout}: make it dense, or "
            "register the buffer with persistent=False"
        )


def tell_statistics(root: nn.Module, heads: Iterable[str]) -> None:
    running = [
        name
        for name in buffers(root)
        if name.endswith((".running_mean", ".running_var")) and not under(name, [*heads])
    ]
    if running:
        warnings.warn(
            f"no LoRA file holds running statistics, got {', '.join(running[:3])}: the base's are "
            f"used. To keep these, {TO_MERGED}",
            stacklevel=5,
        )


def tell_changed(layers: list[str]) -> None:
    """Name the layers whose adapter is over another weight than it began with."""
    if layers:
        warnings.warn(
            f"the base weights of {', '.join(layers)} were changed after their adapters began; the "
            "file belongs over the weights that the adapter has now",
            stacklevel=5,
        )
