"""Full fine-tuning before an adapter is attached, as the QR-LoRA paper does for every method.

The warmed-up model is the base of what follows: an adapter's file belongs to it. It is kept in a
folder, found by everything that decides it, so that runs that share it train it once.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import nn

from .methods import METHODS
from .settings import Settings
from .training import Encoded, Log, train

DECIDING = ("model", "seed", "warmup_epochs", "batch_size", "max_length", "head_lr")


def warm_up(model: nn.Module, data: Encoded, settings: Settings) -> None:
    """Bring ``model`` to its state after ``warmup_epochs``, then freeze all but the head again."""
    if not settings.warmup_epochs:
        return
    path = warmed_file(settings)
    if not path.exists():
        _train(model, data, settings, path)
    model.load_state_dict(load_file(path))


def warmed_file(settings: Settings) -> Path:
    """Where the warmed-up model of these settings lies, whether it was trained already or not."""
    decides = {name: getattr(settings, name) for name in DECIDING}
    decides |= {
        "rate": METHODS["full"].rate,
        "precision": settings.precision,
        "device": settings.device_type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": hashlib.sha256(settings.train_file.read_bytes()).hexdigest(),
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return (settings.warmup_folder or settings.out) / f"warmed-{digest[:16]}.safetensors"


def _train(model: nn.Module, data: Encoded, settings: Settings, path: Path) -> None:
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(True)
    full = replace(settings, adapter="full", options={}, lr=None, epochs=settings.warmup_epochs)
    train(model, data, full, Log(), lambda epoch: print(f"warm-up epoch {epoch} done", flush=True))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains[name])
        parameter.grad = None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(serialized(model.state_dict()))
    os.replace(temporary, path)
