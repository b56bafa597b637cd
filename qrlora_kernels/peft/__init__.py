"""QR-LoRA, LoRA-XS and OHoRA as methods of PEFT: importing this is all it takes.

    import qrlora_kernels.peft as qkp
    model = get_peft_model(base, qkp.QRLoraConfig(target_modules=["query", "value"]))

A file of ours is loaded by PEFT and transformers as any other, where this module was imported
before; without it they end in ``KeyError: 'QK_…'``.
"""

from __future__ import annotations

try:
    import peft
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.tuners.tuners_utils import BaseTuner
except ImportError as error:
    raise ImportError(
        f"qrlora_kernels.peft needs peft >= 0.21: pip install peft ({error})"
    ) from None
if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
    raise ImportError(f"qrlora_kernels.peft needs peft >= 0.21, got {peft.__version__}")

from .config import LoraXSConfig, OHoraConfig, QKPeftType, QRLoraConfig
from .tuner import LoraXSModel, OHoraModel, QRLoraModel

__all__ = [
    "LoraXSConfig",
    "LoraXSModel",
    "OHoraConfig",
    "OHoraModel",
    "QKPeftType",
    "QRLoraConfig",
    "QRLoraModel",
]


def _register() -> None:
    """Enter our three types where PEFT looks them up; what somebody else entered stays."""
    for config, tuner in (
        (QRLoraConfig, QRLoraModel),
        (LoraXSConfig, LoraXSModel),
        (OHoraConfig, OHoraModel),
    ):
        for mapping, value in (
            (PEFT_TYPE_TO_CONFIG_MAPPING, config),
            (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
            (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
        ):
            there = mapping.setdefault(config.kind, value)
            if there is not value:
                raise ImportError(f"PEFT type {config.kind.value} is taken by {there!r}")


_register()
