"""Fused kernels and modules for QR-LoRA, LoRA-XS and OHoRA over frozen linear layers."""

from . import backends, functional, linalg, nn
from .model import adapt, adapted_layers, count_parameters, merge, unload, unmerge
from .nn import LoRAXSLinear, OHoRALinear, QRLinear
from .summary import summary

__version__ = "0.1.0"

__all__ = [
    "LoRAXSLinear",
    "OHoRALinear",
    "QRLinear",
    "adapt",
    "adapted_layers",
    "backends",
    "count_parameters",
    "functional",
    "linalg",
    "merge",
    "nn",
    "summary",
    "unload",
    "unmerge",
]
