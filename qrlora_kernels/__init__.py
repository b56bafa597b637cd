"""Fused kernels and modules for QR-LoRA, LoRA-XS and OHoRA over frozen linear layers."""

from importlib import import_module
from typing import Any

from . import backends, functional, kernels, linalg, nn
from .bank import AdapterBank, per_example
from .export import from_lora_xs, to_lora, to_merged, to_mlx
from .model import (
    adapt,
    adapted_layers,
    combine,
    count_parameters,
    disabled,
    load_adapter,
    merge,
    prepack,
    refresh,
    save_adapter,
    scale,
    set_rank,
    summary,
    unload,
    unmerge,
)
from .model.tune import tune
from .native import build_config
from .nn import LoRAXSLinear, OHoRALinear, QRLinear
from .version import __version__

__all__ = [
    "AdapterBank",
    "LoRAXSLinear",
    "OHoRALinear",
    "QRLinear",
    "__version__",
    "adapt",
    "adapted_layers",
    "backends",
    "build_config",
    "combine",
    "count_parameters",
    "disabled",
    "from_lora_xs",
    "functional",
    "kernels",
    "linalg",
    "load_adapter",
    "merge",
    "nn",
    "per_example",
    "prepack",
    "refresh",
    "save_adapter",
    "scale",
    "set_rank",
    "summary",
    "to_lora",
    "to_merged",
    "to_mlx",
    "tune",
    "unload",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    """``qrlora_kernels.peft``, which needs PEFT, when it is first asked for."""
    if name == "peft":
        return import_module(f"{__name__}.peft")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
