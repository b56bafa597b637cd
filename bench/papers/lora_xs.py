"""Tables and figures of LoRA-XS (Bałazy et al. 2024) that come from training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import mean
from typing import Any

from . import pictures
from .cell import ALL_LINEAR
from .choices import SETTINGS
from .grid import Grid, Variant, grid_table
from .kinds import module_kind
from .measures import RETAINED
from .records import Run
from .scale import TASKS, Scale
from .table import NOT_AT_HAND, Line

PAPER = "LoRA-XS"
RANKS = (4, 8, 16, 25)
LONG = 4  # epochs where scores are compared by epoch
BASES: dict[str, dict[str, str]] = {
    "SVD of W": {"basis": "svd"},
    "SVD of a random matrix": {"basis": "random_svd"},
    "random factors": {"basis": "random"},
    # With Σ at the rate of the others its first direction drowns the rest.
    "SVD of the mean gradient, no Σ": {"basis": "gradient", "sigma": "none"},
}
_TWO = (TASKS[0], TASKS[2])
_OTHER_MODEL = "The paper's models and tasks: --model takes a folder or hub name."


def _xs(label: str, options: dict[str, Any], **fields: Any) -> Variant:
    return Variant(label, "lora_xs", {**SETTINGS["lora_xs"], "options": options, **fields})


def rank_variants(_: Scale) -> list[Variant]:
    return [
        *(_xs(f"LoRA-XS, r = {rank}", {"rank": rank}) for rank in RANKS),
        Variant("VeRA, r = 256", "vera", SETTINGS["vera"]),
        Variant("LoRA, r = 8", "lora", SETTINGS["lora"]),
    ]


def start_variants(scale: Scale) -> list[Variant]:
    epochs = scale.epochs * LONG // 2
    return [
        _xs(f"{label}, r = {rank}", {"rank": rank, **basis}, epochs=epochs)
        for rank, (label, basis) in product((4, 16), BASES.items())
    ]


def vector_variants(_: Scale) -> list[Variant]:
    return [
        _xs(f"{vectors}, r = {rank}", {"rank": rank, "vectors": vectors})
        for rank, vectors in product((4, 16), ("top", "middle", "bottom"))
    ]


def sigma_variants(_: Scale) -> list[Variant]:
    where = {"in": "Σ on the input side", "out": "output side", "split": "both", "none": "no Σ"}
    return [_xs(f"{label}, r = 16", {"rank": 16, "sigma": sigma}) for sigma, label in where.items()]


def retention_variants(_: Scale) -> list[Variant]:
    fields = {"targets": ALL_LINEAR, "measures": ("retention",)}
    return [Variant("full fine-tuning", "full", {**SETTINGS["full"], **fields})]


def by_epoch(grid: Grid) -> Any:
    """The mean score after each epoch, a line for each variant and task."""

    def lines(scale: Scale, runs: Sequence[Run]) -> list[Line]:
        found = []
        for variant, own in grid.by_variant(scale, runs):
            for task in scale.of_tasks(grid.tasks):
                curves = [r.record["scores"] for r in own if r.cell.task == task and r.score]
                if curves:
                    steps = enumerate(map(mean, zip(*curves, strict=True)), start=1)
                    epochs = {f"epoch {epoch}": f"{score:.3f}" for epoch, score in steps}
                    about = {"variant": variant.label, "paper": variant.paper, "task": task}
                    found.append({**about, **epochs, "seeds": str(len(curves))})
        return found

    return lines


def retention_lines(scale: Scale, runs: Sequence[Run]) -> list[Line]:
    """Means over layers and seeds, a line for each kind of module."""
    shares: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for name, own in run.record["measured"]["retention"].items():
            kind = shares.setdefault(module_kind(name), {})
            for what, share in own.items():
                kind.setdefault(what, []).append(share)
    columns = [(rank, what) for rank in RETAINED for what in ("tuned", "update", "random")]
    names = {"tuned": "W + ΔW", "update": "ΔW", "random": "a random matrix"}
    return [
        {"module": kind, "paper": NOT_AT_HAND}
        | {f"{names[what]}, r = {r}": f"{mean(own[f'{what} {r}']):.3f}" for r, what in columns}
        for kind, own in shares.items()
    ]


_RANK = Grid(rank_variants, _TWO)
_START = Grid(start_variants, TASKS[:1])
_VECTORS = Grid(vector_variants, _TWO)
_SIGMA = Grid(sigma_variants, _TWO)
_RETENTION = Grid(retention_variants, TASKS[:1])

TABLES = (
    grid_table(
        _RANK,
        name="xs-rank",
        paper=f"{PAPER}, table 1 and figure 1",
        title="Rank, beside VeRA and LoRA",
        about="Numbers trained against the score, at one rate for all ranks.",
        not_shown=_OTHER_MODEL + " A rate of its own for each rank.",
        draw=pictures.numbers_against_score(_RANK),
    ),
    grid_table(
        _START,
        name="xs-start",
        paper=f"{PAPER}, tables 4 and 10 to 14",
        title="Where the frozen factors come from, by epoch",
        about="Whether the SVD of W converges earlier, and the basis that theorem 3.1 calls best.",
        not_shown=_OTHER_MODEL + " A rate of its own for each basis.",
        lines=by_epoch(_START),
        draw=pictures.score_by_epoch(_START),
    ),
    grid_table(
        _VECTORS,
        name="xs-vectors",
        paper=f"{PAPER}, tables 16 to 18",
        title="Top, middle or bottom singular vectors",
        about="The same number of directions from another part of the spectrum; Σ is theirs.",
        not_shown=_OTHER_MODEL,
    ),
    grid_table(
        _SIGMA,
        name="xs-sigma",
        paper=f"{PAPER}, tables 20 to 23",
        title="Singular values in the factors or not",
        about="At one rate: without Σ the update has another size for the same core.",
        not_shown=_OTHER_MODEL + " A rate of its own for each place of Σ.",
    ),
    grid_table(
        _RETENTION,
        name="xs-retention",
        paper=f"{PAPER}, appendices D and E",
        title="What the top subspaces of W retain of fine-tuned weights and of their updates",
        about="‖U_rU_rᵀ M V_rV_rᵀ‖² / ‖M‖² after full fine-tuning of all layers, M the tuned "
        "weight, its update, or (what chance gives) a random matrix; U_r and V_r are W's.",
        not_shown="The paper's own measure of retention may be defined otherwise.",
        lines=retention_lines,
    ),
)
