"""Drop-in modules over a frozen ``nn.Linear`` or GPT-2's ``Conv1D``."""

from .layer import AdapterLinear
from .lora_xs import LoRAXSLinear, LoRAXSOptions
from .ohora import OHoRALinear, OHoRAOptions
from .qr import QRLinear, QROptions

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
