"""What one run is: a method, its data and how it is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .methods import METHODS, check_options

ALL_LAYERS = "all"


@dataclass(frozen=True)
class Settings:
    """One fine-tuning run, a cell of a table; picklable, because each has a process of its own."""

    adapter: str  # a name in METHODS
    train_file: Path
    eval_file: Path
    out: Path  # a folder of this run's own
    task: str = ""  # what the data are called
    model: str = ""  # a folder or a hub name; empty for the packaged MiniLM-L6
    targets: tuple[str, ...] = ("query", "value")  # or one regular expression, or "all-linear"
    layers: str = ALL_LAYERS  # or "last:4", the last four of the model
    options: Mapping[str, Any] = field(default_factory=dict)  # the adapter's own
    lr: float | None = None
    head_lr: float = 5e-3
    epochs: int = 3
    warmup_epochs: int = 0  # of full fine-tuning, before the adapter is attached
    warmup_folder: Path | None = None  # where runs share warmed-up models (None: in out)
    batch_size: int = 32
    max_length: int = 128
    seed: int = 0
    precision: str = "auto"  # "fp32", "bf16" (autocast), or the faster of the two
    device: str = "cpu"
    progress: bool = True

    def __post_init__(self) -> None:
        check_options(self.adapter, self.options)
        for name in ("epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {self.warmup_epochs}")
        if self.layers != ALL_LAYERS and not re.fullmatch(r"last:[1-9]\d*", self.layers):
            raise ValueError(f"layers must be 'all' or as 'last:4', got {self.layers!r}")

    @property
    def learning_rate(self) -> float:
        return METHODS[self.adapter].rate if self.lr is None else self.lr

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    @property
    def adapter_file(self) -> Path:
        return self.out / "adapter.safetensors"

    @property
    def result_file(self) -> Path:
        return self.out / "result.json"
