"""Adapters in the formats that others load, and theirs as adapters here."""

from .lora import to_lora

__all__ = ["to_lora"]
