"""The plain PyTorch mathematics as a backend: always there, accumulates in fp32, never fast."""

from __future__ import annotations

from ..reference import (
    kron_linear_bwd_ref as kron_linear_bwd,
)
from ..reference import (
    kron_linear_fwd_ref as kron_linear_fwd,
)
from ..reference import (
    linear_add_ref as linear_add_fwd,
)
from ..reference import (
    lora_xs_linear_bwd_ref as lora_xs_linear_bwd,
)
from ..reference import (
    lora_xs_linear_fwd_ref as lora_xs_linear_fwd,
)
from ..reference import (
    qr_linear_bwd_ref as qr_linear_bwd,
)
from ..reference import (
    qr_linear_fwd_ref as qr_linear_fwd,
)
from .problem import Problem

__all__ = [
    "available",
    "kron_linear_bwd",
    "kron_linear_fwd",
    "linear_add_fwd",
    "lora_xs_linear_bwd",
    "lora_xs_linear_fwd",
    "qr_linear_bwd",
    "qr_linear_fwd",
    "supports",
]


def available() -> tuple[bool, str]:
    return True, "plain PyTorch"


def supports(problem: Problem) -> tuple[bool, str]:
    return True, "runs every shape and dtype"
