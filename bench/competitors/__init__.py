"""The variants that are measured, each registered once, each as its users run it."""

from __future__ import annotations

from .registry import LAYERS, STARTS, Layer, Start, layers_for, select, starts_for, temporarily

__all__ = [
    "LAYERS",
    "STARTS",
    "Layer",
    "Start",
    "layers_for",
    "select",
    "starts_for",
    "temporarily",
]
