"""What can be compared, as data: a row of the table for each method and its learning rate.

``bench/notes/demo.md`` says what the rates were chosen from, and which were not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """One row: its name in tables, its learning rate, the options it takes and has here.

    ``provider`` is what attaches it: "package" (this one), "peft", or empty for plain training.
    """

    label: str
    provider: str
    rate: float
    options: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


QR = ("rank", "tau", "rank_rule", "max_rank", "scaling", "dropout", "factors")
LORA_XS = ("rank", "alpha", "vectors", "sigma", "basis", "init_std", "seed", "dropout")
OHORA = ("rank", "alpha", "columns", "start", "product", "fold", "seed", "dropout")
LORA = ("rank", "alpha", "dropout")
IN_PEFT = LORA  # what our configs for PEFT share

# A rate suits what is trained: λ scales factors of the weight's own size, LoRA's product of two
# matrices starts at zero, full fine-tuning moves the weights themselves.
METHODS: dict[str, Method] = {
    "none": Method("head only", "", 0.0),
    "qr": Method("QR-LoRA", "package", 1e-1, QR),
    "lora_xs": Method("LoRA-XS", "package", 2e-2, LORA_XS),
    "ohora": Method("OHoRA", "package", 2e-2, OHORA),
    "lora": Method("LoRA (PEFT)", "peft", 4e-3, LORA, {"rank": 8}),
    "dora": Method("DoRA (PEFT)", "peft", 4e-3, LORA, {"rank": 8}),
    "pissa": Method("PiSSA (PEFT)", "peft", 2e-3, LORA, {"rank": 8}),
    "olora": Method("OLoRA (PEFT)", "peft", 1e-3, LORA, {"rank": 8}),
    "svd_lora": Method("SVD-LoRA (PEFT)", "peft", 4e-3, (*LORA, "directions"), {"rank": 2}),
    "vera": Method("VeRA (PEFT)", "peft", 2e-2, ("rank", "dropout", "d_initial"), {"rank": 256}),
    "qr_peft": Method("QR-LoRA through PEFT", "peft", 1e-1, IN_PEFT + QR[1:4]),
    "lora_xs_peft": Method("LoRA-XS through PEFT", "peft", 2e-2, IN_PEFT + LORA_XS[2:7]),
    "ohora_peft": Method("OHoRA through PEFT", "peft", 2e-2, (*IN_PEFT, *OHORA[2:5], "seed")),
    "full": Method("full fine-tuning", "", 1e-4),
}
DEMO = ("none", "qr", "lora_xs", "ohora", "lora")


@dataclass(frozen=True)
class Option:
    """A flag of the command line for one option of the methods that list it."""

    type: type
    help: str
    choices: tuple[str, ...] = ()
    flag: str = ""  # where the option's own name would not say enough


OPTIONS: dict[str, Option] = {
    "rank": Option(int, "r (default: the method's own rule; 8 for LoRA and its kin)"),
    "alpha": Option(float, "scales the update by alpha / r (default: by 1; PEFT's LoRA by 2)"),
    "scaling": Option(float, "s in front of QR-LoRA's update"),
    "dropout": Option(float, "on the adapter's input, in training"),
    "tau": Option(float, "threshold of QR-LoRA's rank rule"),
    "factors": Option(str, "QR-LoRA: Q and R̃ kept, or Q alone", ("both", "output")),
    "rank_rule": Option(str, "QR-LoRA: what tau means", ("magnitude", "energy", "abs_sum")),
    "max_rank": Option(int, "upper bound on what the rank rule chooses"),
    "vectors": Option(str, "LoRA-XS: which singular vectors", ("top", "middle", "bottom")),
    "sigma": Option(str, "LoRA-XS: where the singular values go", ("in", "out", "split", "none")),
    "basis": Option(
        str,
        "LoRA-XS: the SVD of what",
        ("svd", "random_svd", "random", "gradient"),
    ),
    "init_std": Option(float, "LoRA-XS: deviation of the core's start"),
    "columns": Option(str, "OHoRA: columns of R in the start", ("leading", "selected")),
    "start": Option(str, "OHoRA: the start", ("qr", "svd", "random", "kaiming")),
    "product": Option(str, "OHoRA: how it is multiplied", ("kron", "materialised", "lora")),
    "fold": Option(bool, "OHoRA: keep a second weight without the start"),
    "seed": Option(int, "of LoRA-XS's and OHoRA's random starts", flag="start-seed"),
    "directions": Option(int, "SVD-LoRA: how many of its r start from W's SVD (default 1)"),
    "d_initial": Option(float, "VeRA: the value its d starts from"),
}


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuse a method that there is not, or an option that it does not take."""
    if method not in METHODS:
        raise ValueError(f"adapter must be one of {list(METHODS)}, got {method!r}")
    unknown = sorted(set(options) - set(METHODS[method].options))
    if unknown:
        taken = sorted(METHODS[method].options)
        raise ValueError(f"adapter {method!r} takes the options {taken}, got also {unknown}")
