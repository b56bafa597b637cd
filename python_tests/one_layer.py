"""One small layer in a model, adapted by each kind, and moved from its start."""

from __future__ import annotations

import torch
from torch import nn

import qrlora_kernels as qk

ADAPTERS = {"qr": {"rank": 3}, "lora_xs": {"rank": 3}, "ohora": {}}


def adapt(model: nn.Module, adapter: str = "qr", targets=("0",), **options):
    return qk.adapt(model, list(targets), adapter, progress=False, **(ADAPTERS[adapter] | options))


def x() -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def move(layer: nn.Module) -> None:
    with torch.no_grad():
        for name in layer.trainables:
            getattr(layer, name).add_(0.3)
