"""What the suite runs over: the methods, and their rows on its custom models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, VeraConfig

from qrlora_kernels.peft import LoraXSConfig, OHoraConfig, QRLoraConfig

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A config class, and the options that its rows need.

    Attributes
    ----------
    config : type of PeftConfig
    custom, transformers : mapping
        In the rows over the suite's own models, of layers as small as [2, 20], and over random
        transformers.
    like_lora : bool
        That the method can what the suite asks of ``LoraConfig`` alone, by class: batches that mix
        adapters, and layers of ``Conv1D`` in GPT-2.
    """

    config: type[PeftConfig]
    custom: Options = field(default_factory=dict)
    transformers: Options = field(default_factory=dict)
    like_lora: bool = True

    @property
    def name(self) -> str:
        return self.config.__name__.removesuffix("Config")


METHODS = (
    Method(QRLoraConfig),
    Method(LoraXSConfig),
    # Its start refuses the smallest of the suite's layers, and names these options.
    Method(OHoraConfig, custom={"start": "kaiming"}, transformers={"columns": "selected"}),
)
# A method of PEFT itself: what it fails is no fault of ours, and what it skips is usual.
YARDSTICK = Method(VeraConfig, like_lora=False)


@dataclass(frozen=True)
class CustomRow:
    """A model of the suite, by its name there, and the options of the config put on it."""

    title: str
    model: str
    options: Options
    short: bool = False  # that it is in the short form


CUSTOM = (
    CustomRow("lin0 by a string", "MLP", {"target_modules": "lin0"}),
    CustomRow("lin0", "MLP", {"target_modules": ["lin0"]}, short=True),
    CustomRow("lin1", "MLP", {"target_modules": ["lin1"]}),
    CustomRow("both", "MLP", {"target_modules": ["lin0", "lin1"]}),
    CustomRow("lin1 saved", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    CustomRow("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}, short=True),
)
# Rows whose options VeRA lacks: its share of skips is counted without them.
CUSTOM_OF_OURS = (
    # OHoRA's ranks divide both sides of the layer: [20, 10] and [32, 10].
    CustomRow("rank", "MLP", {"target_modules": ["lin0"], "r": 5}),
    CustomRow("a pattern of ranks", "MLP2", {"target_modules": "lin.", "rank_pattern": {"lin0": 2}}),
    CustomRow("with LayerNorm", "MLP_LayerNorm", {"target_modules": ["lin0", "lin1"]}),
    CustomRow(
        "trainable tokens",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
    ),
)
# The layers that the first of two adapters targets, and the second.
PAIRS = (("Same", ["lin0"], ["lin0"]), ("Different", ["lin0"], ["lin1"]))


def custom_rows(method: Method, short: bool) -> list[tuple[Any, ...]]:
    """Rows of (title, model, config class, options)."""
    rows = CUSTOM + CUSTOM_OF_OURS if method.like_lora else CUSTOM
    return [
        (
            f"{row.title}, {method.name}",
            row.model,
            method.config,
            {**method.custom, **row.options},
        )
        for row in rows
        if row.short or not short
    ]


def pair_rows(method: Method, short: bool) -> list[tuple[Any, ...]]:
    """Rows of (title, tuner, config class, options of one adapter, and of the other)."""
    common = {**method.custom, "init_weights": False}
    return [
        (
            f"{title}, {method.name}",
            method.name.lower(),
            method.config,
            {**common, "target_modules": first},
            {**common, "target_modules": second},
        )
        for title, first, second in PAIRS
        # VeRA's shared projection has the first adapter's shape.
        if first == second or method.like_lora
    ]
