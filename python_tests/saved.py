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
LOW_RANK = ("qr", "lora_xs")
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


def drawn(adapter: str, seed: int, model: nn.Module | None = None, names=("0", "2"), **options):
    """An adapted model whose adapters, and head if it trains, are drawn from ``seed``."""
    model = base() if model is None else model
    options = {"rank": 4} | options
    qk.adapt(model, list(names), adapter, progress=False, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def written(path, *arguments: Any, factors="auto", **options: Any):
    model = drawn(*arguments, **options)
    qk.save_adapter(model, path, factors)
    return path, model


@torch.no_grad()
def updates(model: nn.Module) -> dict[str, torch.Tensor]:
    """ΔW of each layer, from its tensors in fp64."""
    found = {}
    for name, layer in qk.adapted_layers(model).items():
        strength = layer.options.scaling_of(layer.rank) * layer.options.strength
        adapter, t = layer.adapter, layer._tensors()
        gate = t[adapter.gate].double()
        gate = gate.diag() if gate.dim() == 1 else gate.mT
        found[name] = strength * t[adapter.up].double() @ gate @ t[adapter.down].double()
    return found


def assert_is_sum(path, parts, rtol=1e-6):
    """The file at ``path``, in a new base, gives Σ w ΔW of ``parts``, models by their weights."""
    got = updates(qk.load_adapter(base(), path, strict=True))
    all_of = [(w, updates(model)) for model, w in parts.items()]
    assert got.keys() == {name for _, each in all_of for name in each}
    for name in got:
        want = sum(w * each[name] for w, each in all_of if name in each)
        assert float((got[name] - want).abs().max()) <= rtol * float(want.abs().max()), name


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
