"""Fused kernels and modules for QR-LoRA, LoRA-XS and OHoRA over frozen linear layers."""

from . import backends, functional, kernels, linalg, nn
from .adapter_file import load_adapter, save_adapter
from .model import adapt, adapted_layers, count_parameters, merge, unload, unmerge
from .native import build_config
from .nn import LoRAXSLinear, OHoRALinear, QRLinear
from .summary import summary
from .tune import tune
from .version import __version__

__all__ = [
    "LoRAXSLinear",
    "OHoRALinear",
    "QRLinear",
    "__version__",
    "adapt",
    "adapted_layers",
    "backends",
    "build_config",
    "count_parameters",
    "functional",
    "kernels",
    "linalg",
    "load_adapter",
    "merge",
    "nn",
    "save_adapter",
    "summary",
    "tune",
    "unload",
    "unmerge",
]
