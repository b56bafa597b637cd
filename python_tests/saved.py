"""What the tests of adapter files share: a small model, an adapter that has moved, a round trip."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

import qrlora_kernels as qk

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ADAPTERS: dict[str, dict[str, Any]] = {
    "qr": {"rank": 4},
    "lora_xs": {"rank": 4, "alpha": 8.0},
    "ohora": {"columns": "selected", "alpha": 2.0},
}


def base(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Linear(16, 3))
    return nn.Sequential(*layers).to(dtype).eval()


def x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(2)).to(dtype)


def moved(adapter: str, model: nn.Module | None = None, head: bool = False, **options: Any):
    """``model`` with layers 0 and 2 adapted; everything that trains has moved."""
    model = base() if model is None else model
    options = ADAPTERS[adapter] | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainable = ["3"] if head else []
        qk.adapt(model, ["0", "2"], adapter, trainable=trainable, progress=False, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.add_(step.to(parameter.dtype))
    return model.eval()


def refusal(call: Callable[[], object]) -> str:
    """What the error says that ``call`` ends in; empty if it ends in none."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()
