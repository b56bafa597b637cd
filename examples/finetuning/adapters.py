"""Attach, save and load each of the adapters that the example compares."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import nn

import qrlora_kernels as qk

from . import baselines
from .methods import METHODS
from .settings import Settings
from .targets import target_names

HEAD = "head"
ENCODER = "encoder"


def attach(model: nn.Module, settings: Settings) -> nn.Module:
    """Add the adapter to a fresh model in place; only it and the head train afterwards."""
    # The start draws random numbers (LoRA-XS's core, LoRA's A) that depend on the seed alone.
    torch.manual_seed(settings.seed)
    encoder, method = model.get_submodule(ENCODER), METHODS[settings.adapter]
    if not method.provider:
        encoder.requires_grad_(settings.adapter == "full")
        return model
    names = target_names(encoder, settings.targets, settings.layers)
    options = {**method.defaults, **settings.options}
    if method.provider == "peft":
        wrapped = baselines.attach(encoder, names, settings.adapter, options)
        model.set_submodule(ENCODER, wrapped)
        return model
    qk.adapt(
        model,
        [f"{ENCODER}.{name}" for name in names],
        adapter=settings.adapter,
        trainable=[HEAD],
        progress=settings.progress,
        **options,
    )
    # Under autocast no call casts a frozen weight again, and none brings it into a kernel's order.
    return qk.prepack(model, packed="both")


def trained_numbers(model: nn.Module) -> tuple[int, int]:
    """How many numbers train in the adapter, and in the head."""
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    head = sum(size for name, size in sizes.items() if name.startswith(HEAD + "."))
    return sum(sizes.values()) - head, head


def save(model: nn.Module, settings: Settings) -> None:
    """Write what was trained to one file, under a temporary name first."""
    path = settings.adapter_file
    path.parent.mkdir(parents=True, exist_ok=True)
    if METHODS[settings.adapter].provider == "package":
        qk.save_adapter(model, path)
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(serialized({n: p.detach() for n, p in _trainable(model).items()}))
    os.replace(temporary, path)


def load(model: nn.Module, settings: Settings) -> nn.Module:
    """Adapt a fresh model with what :func:`save` wrote."""
    if METHODS[settings.adapter].provider == "package":
        return qk.prepack(qk.load_adapter(model, settings.adapter_file), packed="forward")
    model = attach(model, settings)
    load_trained(model, settings.adapter_file)
    return model


def load_trained(model: nn.Module, path: Path) -> None:
    saved, own = load_file(path), _trainable(model)
    if saved.keys() != own.keys():
        raise ValueError(f"{path} must hold {sorted(own)}, got {sorted(saved)}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}
