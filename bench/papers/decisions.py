"""What the package's own defaults are decided from: QR-LoRA's rank rule, and learning rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from .cell import ALL_LINEAR, QUERY_VALUE, Cell
from .choices import SETTINGS
from .grid import spread, trained
from .records import Run
from .scale import Scale
from .table import Line, TrainedTable

DECIDED_ON = ("movies", "tweets", "reviews")
# The same τ is not the same number: at .7 energy keeps about as many as magnitude at .5.
RULES = (("magnitude", 0.5), ("energy", 0.5), ("energy", 0.7))
RULE_RATES = (5e-2, 1e-1, 2e-1)
SCOPES = {"query, value": QUERY_VALUE, "all linear": ALL_LINEAR}
# Around what the notes on the demo found, a step of two or three to both sides.
RATES: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "qr": {"query, value": (5e-2, 1e-1, 2e-1), "all linear": (1e-2, 3e-2, 1e-1)},
    "lora_xs": {"query, value": (1e-2, 2e-2, 5e-2), "all linear": (5e-3, 1e-2, 2e-2)},
    "ohora": {"query, value": (1e-2, 2e-2, 5e-2), "all linear": (5e-3, 1e-2, 2e-2)},
    "lora": {"query, value": (2e-3, 4e-3, 8e-3), "all linear": (1e-3, 2e-3, 4e-3)},
}
Key = tuple[str, ...]
Keyed = Iterator[tuple[Key, Cell]]


def _rules(scale: Scale) -> Keyed:
    """(rule, τ), seeds outermost and rules innermost: a prefix compares all alike."""
    for seed in scale.of_seeds(5):
        for task in scale.of_tasks(DECIDED_ON):
            for rate in RULE_RATES:
                for rule, tau in RULES:
                    options = {"tau": tau, "rank_rule": rule}
                    yield (rule, f"{tau:g}"), scale.cell("qr", task, seed, options=options, lr=rate)


def _rates(scale: Scale) -> Keyed:
    """(adapter, scope), seeds outermost."""
    for seed in scale.of_seeds(3):
        for task in scale.of_tasks(DECIDED_ON):
            for adapter, scopes in RATES.items():
                for scope, rates in scopes.items():
                    same: dict[str, Any] = dict(SETTINGS[adapter], targets=SCOPES[scope])
                    for rate in rates:
                        yield (
                            (adapter, scope),
                            scale.cell(adapter, task, seed, **{**same, "lr": rate}),
                        )


def _best_rates(
    keyed: Callable[[Scale], Keyed], columns: Sequence[str]
) -> Callable[[Scale, Sequence[Run]], list[Line]]:
    """A line for each key and task: the score at every rate, and the rate of the best mean."""

    def lines(scale: Scale, runs: Sequence[Run]) -> list[Line]:
        by_digest = {run.cell.digest(): run for run in runs}
        own: dict[tuple[Key, str], dict[float, list[Run]]] = {}
        for key, cell in keyed(scale):
            run = by_digest.get(cell.digest())
            if run is not None:
                by_rate = own.setdefault((key, cell.task), {})
                by_rate.setdefault(run.record["cell"]["lr"], []).append(run)
        return [
            dict(zip(columns, key, strict=True)) | {"task": task} | _line_of(by_rate)
            for (key, task), by_rate in sorted(own.items(), key=lambda item: item[0][1])
        ]

    return lines


def _line_of(by_rate: Mapping[float, Sequence[Run]]) -> Line:
    best = max(by_rate, key=lambda rate: _mean(by_rate[rate]))
    return {
        "trained": trained(by_rate[best]),
        "best rate": f"{best:g}",
        "score there": spread(by_rate[best]),
        "all rates": ", ".join(
            f"{rate:g}: {_mean(runs):.3f}" for rate, runs in sorted(by_rate.items())
        ),
    }


def _mean(runs: Sequence[Run]) -> float:
    """A run that diverged counts as nothing learned."""
    return mean(run.score or 0.0 for run in runs)


def energy_against_magnitude(scale: Scale, runs: Sequence[Run]) -> str:
    """The difference on each task, seed by seed, each at its best rate."""
    magnitude, *others = RULES
    told = [_difference(scale, runs, other, magnitude) for other in others]
    return " ".join(sentence for sentence in told if sentence)


Rule = tuple[str, float]


def _difference(scale: Scale, runs: Sequence[Run], ours: Rule, theirs: Rule) -> str:
    told = []
    for task in scale.of_tasks(DECIDED_ON):
        mine, other = (_best(runs, rule, task) for rule in (ours, theirs))
        shared = sorted(mine.keys() & other.keys())
        if not shared:
            continue
        gains = [mine[seed] - other[seed] for seed in shared]
        error = f" ± {stdev(gains) / len(gains) ** 0.5:.3f}" if len(gains) > 1 else ""
        told.append(f"{task} {mean(gains):+.3f}{error}")
    if not told:
        return ""
    names = [f"{rule} at τ = {tau:g}" for rule, tau in (ours, theirs)]
    return (
        f"{names[0].capitalize()} over {names[1]} (mean of the seeds ± its standard error): "
        f"{'; '.join(told)}."
    )


def _best(runs: Sequence[Run], rule: Rule, task: str) -> dict[int, float]:
    """The scores by seed at the rate of the best mean."""
    by_rate: dict[float, dict[int, float]] = {}
    for run in runs:
        options = run.cell.options
        if run.cell.task == task and (options["rank_rule"], options["tau"]) == rule:
            scores = by_rate.setdefault(run.record["cell"]["lr"], {})
            scores[run.cell.seed] = run.score or 0.0
    return max(by_rate.values(), key=lambda scores: mean(scores.values()), default={})


def _table(keyed: Callable[[Scale], Keyed], columns: Sequence[str], **about: Any) -> TrainedTable:
    return TrainedTable(
        cells=lambda scale: [cell for _, cell in keyed(scale)],
        lines=_best_rates(keyed, columns),
        **about,
    )


TABLES = (
    _table(
        _rules,
        ("rule", "τ"),
        name="rules",
        paper="QR-LoRA, section 4.1 against eq. 4",
        title="The rank rule",
        about=(
            "Magnitude (the count of |R_ii| > τ|R₁₁|) against energy (the smallest r whose R_ii² "
            "reach τ of the whole) on query and value, each at the best of three rates."
        ),
        not_shown="The rate is chosen on the rows that the score is of, for all rules alike.",
        remark=energy_against_magnitude,
    ),
    _table(
        _rates,
        ("adapter", "scope"),
        name="rates",
        paper="no paper: defaults of this package",
        title="Learning rates",
        about="Every adapter at three rates, on query and value and on all linear layers.",
        not_shown="The best rate at this length of training may not be that of a longer one.",
    ),
)
