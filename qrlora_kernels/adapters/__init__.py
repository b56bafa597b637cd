"""The three adapters without a module; :mod:`qrlora_kernels.nn` makes layers of them."""

from .adapter import Adapter, AnyAdapter, State, Tensors
from .lora_xs import LoRAXS, LoRAXSOptions
from .ohora import OHoRA, OHoRAOptions
from .options import Options
from .qr import QR, QROptions

# The names that ``adapt`` and the adapter file use.
ADAPTERS: dict[str, AnyAdapter] = {adapter.kind: adapter for adapter in (QR, LoRAXS, OHoRA)}

__all__ = [
    "ADAPTERS",
    "QR",
    "Adapter",
    "AnyAdapter",
    "LoRAXS",
    "LoRAXSOptions",
    "OHoRA",
    "OHoRAOptions",
    "Options",
    "QROptions",
    "State",
    "Tensors",
]
