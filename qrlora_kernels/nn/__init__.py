"""Drop-in modules over a frozen ``nn.Linear`` or GPT-2's ``Conv1D``."""

from ..adapters import LoRAXSOptions, OHoRAOptions, QROptions
from .layer import AdapterLinear
from .lora_xs import LoRAXSLinear
from .ohora import OHoRALinear
from .qr import QRLinear

# The names that ``adapt`` and the adapter file use.
ADAPTERS: dict[str, type[AdapterLinear]] = {
    layer.kind: layer for layer in (QRLinear, LoRAXSLinear, OHoRALinear)
}

__all__ = [
    "ADAPTERS",
    "AdapterLinear",
    "LoRAXSLinear",
    "LoRAXSOptions",
    "OHoRALinear",
    "OHoRAOptions",
    "QRLinear",
    "QROptions",
]
