"""What one run is: the options of the command line, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ADAPTERS = ("none", "qr", "lora_xs", "ohora", "lora")
# "none" trains the head alone, "lora" is PEFT's. A rate suits what is trained: λ scales factors of
# the weight's own size, LoRA's product of two matrices starts at zero.
LEARNING_RATES = {"none": 0.0, "qr": 5e-2, "lora_xs": 2e-2, "ohora": 2e-2, "lora": 4e-3}
LORA_RANK = 8
NAMES = {
    "none": "head only",
    "qr": "QR-LoRA",
    "lora_xs": "LoRA-XS",
    "ohora": "OHoRA",
    "lora": "LoRA (PEFT)",
}


@dataclass(frozen=True)
class Settings:
    """One fine-tuning run; picklable, so that each run can have a process of its own."""

    adapter: str
    train_file: Path
    eval_file: Path
    out: Path  # a folder of this run's own
    model: str = ""  # a folder or a hub name; empty for the packaged MiniLM-L6
    targets: tuple[str, ...] = ("query", "value")  # or one regular expression, or "all-linear"
    rank: int | None = None  # None: the adapter's own default
    tau: float | None = None  # QR-LoRA's threshold of the magnitude rule
    lr: float | None = None
    head_lr: float = 5e-3
    epochs: int = 3
    batch_size: int = 32
    max_length: int = 128
    seed: int = 0
    precision: str = "auto"  # "fp32", "bf16" (autocast), or the faster of the two
    device: str = "cpu"
    progress: bool = True

    def __post_init__(self) -> None:
        if self.adapter not in ADAPTERS:
            raise ValueError(f"adapter must be one of {list(ADAPTERS)}, got {self.adapter!r}")
        if self.tau is not None and self.adapter != "qr":
            raise ValueError(f"tau is an option of adapter 'qr' alone, got {self.adapter!r}")
        for name in ("epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATES[self.adapter] if self.lr is None else self.lr

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    @property
    def adapter_file(self) -> Path:
        return self.out / "adapter.safetensors"

    @property
    def result_file(self) -> Path:
        return self.out / "result.json"
