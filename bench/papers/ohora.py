"""Tables and figures of OHoRA (Zhang et al., EMNLP 2025) that come from training."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from . import pictures
from .choices import RANK, SETTINGS
from .grid import Grid, Variant, grid_table
from .records import Run
from .scale import TASKS, Scale
from .table import NOT_AT_HAND, Line

PAPER = "OHoRA"
RANKS = (2, 4, 8, 16)
QUARTERS = 4
LONG = 4  # epochs of a loss curve
_TWO = (TASKS[0], TASKS[2])
_OTHER_MODEL = "The paper's models and tasks: --model takes a folder or hub name."


def _ohora(label: str, **options: Any) -> Variant:
    fields = {**SETTINGS["ohora"], "options": {"rank": RANK, **options}}
    return Variant(label, "ohora", fields)


def start_variants(_: Scale) -> list[Variant]:
    return [
        _ohora("QR, R[I, I]", columns="selected"),
        _ohora("QR, R[I, :r] (to the letter)", columns="leading"),
        _ohora("SVD in place of QR", columns="selected", start="svd"),
        _ohora("2r random indices", columns="selected", start="random"),
        _ohora("Kaiming", start="kaiming"),
        _ohora("without Kronecker, A Bᵀ", columns="selected", product="lora"),
    ]


def rank_variants(_: Scale) -> list[Variant]:
    return [
        Variant(
            f"OHoRA, r = {rank}",
            "ohora",
            {**SETTINGS["ohora"], "options": {"rank": rank, "columns": "selected"}},
        )
        for rank in RANKS
    ]


def effective_variants(_: Scale) -> list[Variant]:
    methods = {
        "QR-LoRA": "qr",
        "LoRA-XS, r = 16": "lora_xs",
        "OHoRA, r = 16": "ohora",
        "LoRA, r = 8": "lora",
        "PiSSA, r = 8": "pissa",
        "full fine-tuning": "full",
    }
    return [
        Variant(label, name, {**SETTINGS[name], "measures": ("effective_rank",)})
        for label, name in methods.items()
    ]


def loss_variants(scale: Scale) -> list[Variant]:
    methods = {"OHoRA, r = 16": "ohora", "PiSSA, r = 8": "pissa", "full fine-tuning": "full"}
    fields = {"epochs": scale.epochs * LONG // 2}
    return [Variant(label, name, {**SETTINGS[name], **fields}) for label, name in methods.items()]


def effective_lines(scale: Scale, runs: Sequence[Run]) -> list[Line]:
    """By kind of layer: means over seeds, least and largest over layers."""
    found = []
    for variant, own in _EFFECTIVE.by_variant(scale, runs):
        by_layer: dict[str, list[float]] = {}
        for run in own:
            for name, rank in run.record["measured"]["effective_rank"].items():
                by_layer.setdefault(name, []).append(rank)
        means = {name: mean(ranks) for name, ranks in by_layer.items()}
        line = {"variant": variant.label, "paper": variant.paper}
        for kind in ("query", "value"):
            ranks = [rank for name, rank in means.items() if name.endswith(kind)]
            if ranks:
                reach = f"({min(ranks):.1f} … {max(ranks):.1f})"
                line[f"{kind}: mean (range over layers)"] = f"{mean(ranks):.1f} {reach}"
        found.append(line)
    return found


def loss_lines(scale: Scale, runs: Sequence[Run]) -> list[Line]:
    """The mean training loss in each quarter of the steps."""
    found = []
    for variant, own in _LOSS.by_variant(scale, runs):
        curves = [run.record["losses"] for run in own if run.score is not None]
        if not curves:
            continue
        parts = [_quarter(curves, part) for part in range(QUARTERS)]
        names = [f"quarter {part + 1} of the steps" for part in range(QUARTERS)]
        found.append(
            {"variant": variant.label, "paper": NOT_AT_HAND}
            | {name: f"{loss:.3f}" for name, loss in zip(names, parts, strict=True)}
            | {"seeds": str(len(curves))}
        )
    return found


def _quarter(curves: Sequence[Sequence[float]], part: int) -> float:
    def cut(curve: Sequence[float]) -> Sequence[float]:
        return curve[part * len(curve) // QUARTERS : (part + 1) * len(curve) // QUARTERS]

    return mean(loss for curve in curves for loss in cut(curve))


_START = Grid(start_variants, _TWO)
_RANK = Grid(rank_variants, _TWO)
_EFFECTIVE = Grid(effective_variants, TASKS[:1])
_LOSS = Grid(loss_variants, TASKS[:1])

TABLES = (
    grid_table(
        _START,
        name="ohora-start",
        paper=f"{PAPER}, table 3; the SVD start of table 10",
        title="Starts of A and B, and the update without a Kronecker product",
        about="Without Kronecker the factors are uncut and train r times as many numbers.",
        not_shown=_OTHER_MODEL,
    ),
    grid_table(
        _RANK,
        name="ohora-rank",
        paper=f"{PAPER}, figure 5",
        title="The rank of the factors",
        about="r up to r_high = 16 of MiniLM's layers. N + K numbers train whatever r is; the rank "
        "of the product is at most r².",
        not_shown=_OTHER_MODEL,
    ),
    grid_table(
        _EFFECTIVE,
        name="ohora-effective",
        paper=f"{PAPER}, figures 1b and 3",
        title="The effective rank of what was learned",
        about="exp of the entropy of ΔW's singular values (eq. 17), of width 384.",
        not_shown=_OTHER_MODEL,
        lines=effective_lines,
        draw=pictures.by_layer(_EFFECTIVE, "effective_rank"),
    ),
    grid_table(
        _LOSS,
        name="ohora-loss",
        paper=f"{PAPER}, figure 4",
        title="Training loss against full fine-tuning and PiSSA",
        about="The same batches in the same order for all.",
        not_shown=_OTHER_MODEL,
        lines=loss_lines,
        draw=pictures.loss_curves(_LOSS),
    ),
)
