"""One training run of a table, as data; what it is called by is the digest of all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetuning.methods import METHODS
from finetuning.settings import ALL_LAYERS, Settings

QUERY_VALUE = ("query", "value")
ALL_LINEAR = ("all-linear",)


@dataclass(frozen=True)
class Cell:
    """A run of :func:`finetuning.run.fine_tune`, and what is measured on the trained model.

    Nothing that decides the outcome is left to a default elsewhere, so that a row goes on saying
    what was run when a default changes.
    """

    adapter: str
    task: str
    seed: int
    train_rows: int
    eval_rows: int
    epochs: int
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None  # None: the method's own
    targets: tuple[str, ...] = QUERY_VALUE
    layers: str = ALL_LAYERS
    warmup_epochs: int = 0
    batch_size: int = 16
    max_length: int = 64
    model: str = ""
    measures: tuple[str, ...] = ()  # keys of measures.MEASURES

    def claims(self) -> dict[str, Any]:
        """What the row of this cell says was run, in JSON's types."""
        method = METHODS[self.adapter]
        filled = asdict(self) | {
            "options": {**method.defaults, **self.options},
            "lr": method.rate if self.lr is None else self.lr,
        }
        claimed: dict[str, Any] = json.loads(json.dumps(filled))
        return claimed

    def digest(self) -> str:
        text = json.dumps(self.claims(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def settings(self, files: tuple[Path, Path], folder: Path) -> Settings:
        """The run itself; ``folder`` holds the runs of all cells."""
        claims = self.claims()
        return Settings(
            adapter=self.adapter,
            train_file=files[0],
            eval_file=files[1],
            out=folder / self.digest(),
            task=self.task,
            model=self.model,
            targets=self.targets,
            layers=self.layers,
            options=claims["options"],
            lr=claims["lr"],
            epochs=self.epochs,
            warmup_epochs=self.warmup_epochs,
            warmup_folder=folder / "warmed",
            batch_size=self.batch_size,
            max_length=self.max_length,
            seed=self.seed,
            precision="fp32",
            progress=False,
        )
