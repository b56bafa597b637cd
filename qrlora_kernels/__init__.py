"""Fused kernels and modules for QR-LoRA, LoRA-XS and OHoRA over frozen linear layers."""

from . import functional

__all__ = ["functional"]
