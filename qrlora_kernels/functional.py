"""What other adapter code imports: one function per fused operation."""

from .ops.kron_linear import kron_linear
from .ops.linear_add import linear_add
from .ops.lora_xs_linear import lora_xs_linear
from .ops.qr_linear import qr_linear

__all__ = ["kron_linear", "linear_add", "lora_xs_linear", "qr_linear"]
