"""Tables and figures of QR-LoRA (Liang & Bharadwaj 2025) that come from training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import mean, stdev
from typing import Any

from . import pictures
from .choices import SETTINGS, TAU
from .grid import Grid, Variant, grid_table, last_scores, of_task
from .records import Run
from .scale import TASKS, Scale
from .table import Line

PAPER = "QR-LoRA"
TAUS = (0.5, 0.7, 0.8)
WHERE: dict[str, dict[str, Any]] = {
    "W_o, all layers": {"targets": ("attention.output.dense",)},
    "W_o, last 4": {"targets": ("attention.output.dense",), "layers": "last:4"},
    "W_q, W_v, all layers": {},
    "W_q, W_v, last 4": {"layers": "last:4"},
}
# Of its twelve W_o: numbers trained, and their share of the width.
PAPER_COUNTS = {0.5: "1,702 numbers, .185", 0.7: "3,142 numbers, .341", 0.8: "4,053 numbers, .440"}
LORA_2 = "LoRA, r = 2"
OURS = "QR-LoRA, magnitude"  # the better rule


def warmed(scale: Scale, name: str, **changes: Any) -> dict[str, Any]:
    """Fields of a cell of the method ``name`` after the paper's epochs of full fine-tuning."""
    return {**SETTINGS[name], "warmup_epochs": scale.warmup_epochs, **changes}


def tau_variants(scale: Scale) -> list[Variant]:
    return [
        Variant(
            f"{where}, τ = {tau:g}",
            "qr",
            warmed(scale, "qr", options={"tau": tau, "rank_rule": "energy"}, **fields),
            f"{PAPER_COUNTS[tau]} of the width; score not at hand"
            if where == "W_o, all layers"
            else "not at hand",
        )
        for (where, fields), tau in product(WHERE.items(), TAUS)
    ]


def compared(**warm: Any) -> list[Variant]:
    """QR-LoRA by both rules and what the paper compares it with."""
    energy = {**SETTINGS["qr"], "options": {"tau": TAU, "rank_rule": "energy"}}
    two = {**SETTINGS["lora"], "options": {"rank": 2}}
    return [
        Variant("head only", "none", {**SETTINGS["none"], **warm}),
        Variant(OURS, "qr", {**SETTINGS["qr"], **warm}),
        Variant("QR-LoRA, energy", "qr", {**energy, **warm}),
        Variant(LORA_2, "lora", {**two, **warm}),
        Variant("SVD-LoRA, r = 2", "svd_lora", {**SETTINGS["svd_lora"], **warm}),
        Variant("full fine-tuning", "full", {**SETTINGS["full"], **warm}),
    ]


def size_variants(scale: Scale) -> list[Variant]:
    methods = {"QR-LoRA": "qr", LORA_2: "lora", "full fine-tuning": "full"}
    rank = {"lora": {"options": {"rank": 2}}}
    return [
        Variant(
            f"{label}, {size:,} sentences",
            name,
            warmed(scale, name, train_rows=size, **rank.get(name, {})),
        )
        for size, (label, name) in product(scale.sizes, methods.items())
    ]


def order_variants(_: Scale) -> list[Variant]:
    return [
        Variant(
            f"QR-LoRA, {rule}",
            "qr",
            {
                **SETTINGS["qr"],
                "options": {"tau": TAU, "rank_rule": rule},
                "measures": ("ordering",),
            },
        )
        for rule in ("energy", "magnitude")
    ]


def within_lora(grid: Grid) -> Any:
    """On how many tasks QR-LoRA is within one standard deviation of LoRA r = 2."""

    def remark(scale: Scale, runs: Sequence[Run]) -> str:
        own = {variant.label: runs for variant, runs in grid.by_variant(scale, runs)}
        told, held = [], 0
        for task in scale.of_tasks(grid.tasks):
            ours, lora = (
                last_scores(of_task(own.get(label, ()), task)) for label in (OURS, LORA_2)
            )
            if len(ours) < 2 or len(lora) < 2:
                continue
            short, deviation = mean(lora) - mean(ours), max(stdev(ours), stdev(lora))
            held += short <= deviation
            told.append(f"{task} {-short:+.3f} (deviation {deviation:.3f})")
        if not told:
            return ""
        return (
            f"{OURS} is at most one standard deviation below {LORA_2} on {held} of "
            f"{len(told)} tasks: {'; '.join(told)}."
        )

    return remark


def order_lines(scale: Scale, runs: Sequence[Run]) -> list[Line]:
    """Means over layers, tasks and seeds of the share that the first tenth holds."""
    return [
        {
            "variant": variant.label,
            "paper": variant.paper,
            **{
                column: f"{mean(run.record['measured']['ordering'][name] for run in own):.3f}"
                for name, column in (
                    ("learned", "|λ|²R² in the first tenth"),
                    ("lam", "|λ|² alone"),
                    ("spectrum", "R² alone"),
                )
            },
        }
        for variant, own in _ORDER.by_variant(scale, runs)
    ]


_TWO = TASKS[:2]
_TAU = Grid(tau_variants, TASKS[:1])
_WARM = Grid(lambda scale: compared(warmup_epochs=scale.warmup_epochs), TASKS)
_COLD = Grid(lambda _: compared(), TASKS)
_SIZE = Grid(size_variants, TASKS[:1])
_FIGURE = Grid(lambda s: [*compared(warmup_epochs=s.warmup_epochs), *tau_variants(s)], TASKS[:1])
_ORDER = Grid(order_variants, _TWO)
_OTHER_MODEL = "The paper's model, RoBERTa-base, and its tasks: --model takes a folder or hub name."

TABLES = (
    grid_table(
        _TAU,
        name="qr-tau",
        paper=f"{PAPER}, tables 1 and 2",
        title="τ, which matrices and which layers",
        about="The energy rule (eq. 4), which the counts of the paper's tables follow, after a "
        "warm-up by full fine-tuning.",
        not_shown=_OTHER_MODEL + " MiniLM has six layers of width 384, the paper's model twelve "
        "of 768.",
        draw=pictures.numbers_against_score(_TAU),
    ),
    grid_table(
        _WARM,
        name="qr-warmed",
        paper=f"{PAPER}, table 3",
        title="Against LoRA r = 2, SVD-LoRA and full fine-tuning, warmed up",
        about="Every method starts from the same full fine-tuning of some epochs, as in the paper.",
        not_shown=_OTHER_MODEL + " On this little data the warm-up leaves little to learn.",
        remark=within_lora(_WARM),
    ),
    grid_table(
        _COLD,
        name="qr-pretrained",
        paper=f"{PAPER}, table 3",
        title="The same from the pretrained model",
        about="No warm-up: all of what is learned is the adapter's and the head's.",
        not_shown="The paper warms every method up.",
        remark=within_lora(_COLD),
        draw=pictures.numbers_against_score(_COLD),
    ),
    grid_table(
        _SIZE,
        name="qr-size",
        paper=f"{PAPER}, table 4",
        title="The size of the training set",
        about="The warm-up sees the same sentences and no more.",
        not_shown="The paper's own sizes of its own tasks.",
        draw=pictures.by_size(_SIZE),
    ),
    grid_table(
        _FIGURE,
        name="qr-numbers",
        paper=f"{PAPER}, figure 1",
        title="Numbers trained against the score",
        about="The runs of the tables above on one task, drawn.",
        not_shown=_OTHER_MODEL,
        draw=pictures.numbers_against_score(_FIGURE),
    ),
    grid_table(
        _ORDER,
        name="qr-order",
        paper=f"{PAPER}, section 3.2",
        title="What the ordering of the directions is worth",
        about="The share of Σ|λ_i|²R_ii² that the first tenth of a layer's directions holds after "
        "training, beside the shares of its two parts: .100 would be no order at all.",
        not_shown="The paper's own shares are of its models.",
        lines=order_lines,
    ),
)
