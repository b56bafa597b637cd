"""Adapters in the formats that others load, and theirs as adapters here."""

from .lora import to_lora
from .lora_xs import from_lora_xs
from .merged import to_merged
from .mlx import to_mlx

__all__ = ["from_lora_xs", "to_lora", "to_merged", "to_mlx"]
