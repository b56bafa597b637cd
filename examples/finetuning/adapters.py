"""Attach, save and load each of the adapters that the example compares."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import nn

import qrlora_kernels as qk

from .settings import LORA_RANK, Settings

HEAD = "head"


def attach(model: nn.Module, settings: Settings) -> nn.Module:
    """Add the adapter to a fresh model in place; only it and the head train afterwards."""
    # The start draws random numbers (LoRA-XS's core, LoRA's A) that depend on the seed alone.
    torch.manual_seed(settings.seed)
    if settings.adapter == "none":
        return model
    if settings.adapter == "lora":
        return _attach_lora(model, settings)
    return qk.adapt(
        model,
        targets(settings),
        adapter=settings.adapter,
        trainable=[HEAD],
        progress=settings.progress,
        **options(settings),
    )


def options(settings: Settings) -> dict[str, Any]:
    """What the command line sets of the adapter's options; the rest keep their defaults."""
    given = {"rank": settings.rank, "tau": settings.tau}
    return {name: value for name, value in given.items() if value is not None}


def targets(settings: Settings) -> str | list[str]:
    """A list of names, or the one expression; PEFT takes a string for nothing but that."""
    first, *more = settings.targets
    is_name = re.fullmatch(r"[\w.]+", first) is not None
    return list(settings.targets) if more or is_name else first


def _attach_lora(model: nn.Module, settings: Settings) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    rank = settings.rank or LORA_RANK
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets(settings))
    inject_adapter_in_model(config, model.get_submodule("encoder"))
    return model


def trained_numbers(model: nn.Module) -> tuple[int, int]:
    """How many numbers train in the adapter, and in the head."""
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    head = sum(size for name, size in sizes.items() if name.startswith(HEAD + "."))
    return sum(sizes.values()) - head, head


def save(model: nn.Module, settings: Settings) -> None:
    """Write what was trained to one file, under a temporary name first."""
    path = settings.adapter_file
    path.parent.mkdir(parents=True, exist_ok=True)
    if settings.adapter not in ("none", "lora"):
        qk.save_adapter(model, path)
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(serialized({n: p.detach() for n, p in _trainable(model).items()}))
    os.replace(temporary, path)


def load(model: nn.Module, settings: Settings) -> nn.Module:
    """Adapt a fresh model with what :func:`save` wrote."""
    if settings.adapter not in ("none", "lora"):
        return qk.load_adapter(model, settings.adapter_file)
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
