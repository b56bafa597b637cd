"""The adapters of the library PEFT, and the package's own as PEFT's users have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

# The package's configs for PEFT
OURS = {"qr_peft": "QRLoraConfig", "lora_xs_peft": "LoraXSConfig", "ohora_peft": "OHoraConfig"}
# PEFT's init_lora_weights
STARTS: dict[str, Literal["pissa", "olora"]] = {"pissa": "pissa", "olora": "olora"}


def attach(
    encoder: nn.Module, names: Sequence[str], method: str, options: dict[str, Any]
) -> nn.Module:
    """``encoder`` with PEFT's ``method`` in the layers ``names``; nothing else of it trains."""
    from peft import get_peft_model

    wrapped = get_peft_model(encoder, _config(method, list(names), options))
    if method == "svd_lora":
        for name in names:
            _start_from_svd(encoder.get_submodule(name), options.get("directions", 1))
    return wrapped


def _config(method: str, names: list[str], options: dict[str, Any]) -> Any:
    from peft import LoraConfig, VeraConfig

    if method in OURS:
        import qrlora_kernels.peft

        named = {"r" if name == "rank" else name: value for name, value in options.items()}
        return getattr(qrlora_kernels.peft, OURS[method])(target_modules=names, **named)
    rank, dropout = options["rank"], options.get("dropout", 0.0)
    if method == "vera":
        start = {"d_initial": options["d_initial"]} if "d_initial" in options else {}
        return VeraConfig(r=rank, vera_dropout=dropout, target_modules=names, **start)
    return LoraConfig(
        r=rank,
        lora_alpha=options.get("alpha", 2 * rank),
        lora_dropout=dropout,
        target_modules=names,
        use_dora=method == "dora",
        init_lora_weights=STARTS.get(method, True),
    )


@torch.no_grad()
def _start_from_svd(layer: Any, directions: int) -> None:
    """Take the first directions of the update from the weight's SVD, the others as LoRA's.

    The QR-LoRA paper compares with LoRA of r = 2 whose matrices start from one singular vector. As
    in PiSSA, what the update starts with is taken out of the weight: the model starts unchanged.
    """
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if not 1 <= directions <= len(down):
        raise ValueError(f"directions must be in 1 .. rank = {len(down)}, got {directions}")
    weight: Tensor = layer.get_base_layer().weight
    weight = weight.T if layer.fan_in_fan_out else weight  # transformers' Conv1D holds [K, N]
    u, s, vt = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (s[:directions] / layer.scaling["default"]).sqrt()
    down[:directions] = root[:, None] * vt[:directions]
    up[:, :directions] = u[:, :directions] * root
    weight -= layer.scaling["default"] * (up @ down).to(weight.dtype)
