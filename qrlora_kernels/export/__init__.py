"""Adapters in the formats that others load, and theirs as adapters here."""

from .lora import to_lora
from .merged import to_merged

__all__ = ["to_lora", "to_merged"]
