"""What the suites share: the options of a run, building and gating variants, rows from timings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

import qrlora_kernels as qk

from ..competitors import Layer, layers_for
from ..competitors.plain import EAGER, expression
from ..gate import Verdict, judge
from ..problem import LayerProblem, Runner, Unavailable
from ..registry import ADAPTERS, EFFORT, Case, Effort
from ..rows import OK, OTHER, RED, SKIPPED, Row
from ..timing import EventClock, Task, Timing, WallClock, graph_task, measure

FLOOR = "frozen"
_GRAPH_UP_TO = 256  # tokens: beyond, launches hide behind the work


@dataclass(frozen=True)
class Options:
    """What the command line chose."""

    device: str = "cpu"
    effort: Effort = EFFORT["short"]
    adapters: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    cold: bool = False
    gate_only: bool = False
    full: bool = False
    tick: Callable[[float], None] = field(default=lambda share: None)

    @property
    def cache(self) -> str:
        return "cold" if self.cold else "warm"


@dataclass
class Built:
    """A variant that runs, with the verdict of its gate (None where there is nothing to gate)."""

    layer: Layer
    runner: Runner
    row: Row  # its status, gate, backend and identity; the numbers come later


class Gates:
    """fp64 results and plain errors of one problem, computed once per family."""

    def __init__(self, problem: LayerProblem) -> None:
        self.problem = problem
        self._known: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    def judge(self, layer: Layer, runner: Runner) -> Verdict:
        adapter = layer.adapter
        if adapter not in self._known:
            plain = results(expression(adapter, EAGER[adapter], self.problem), self.problem)
            self._known[adapter] = plain, self.problem.expected(adapter)
        plain, expected = self._known[adapter]
        return judge(results(runner, self.problem), plain, expected)


def results(runner: Runner, problem: LayerProblem) -> dict[str, torch.Tensor]:
    """y, dx and the gradients of one forward and backward."""
    y = runner.forward(problem.x)
    return {"y": y.detach(), **runner.gradients(y, problem.x, problem.dy.to(y.dtype))}


def build_all(
    suite: str, case: Case, options: Options, layers: Sequence[Layer] | None = None
) -> tuple[LayerProblem, list[Built], list[Row]]:
    """The problem, the variants that run, each gated, and a row for each that is skipped."""
    problem = LayerProblem(case, options.device)
    gates, built, skipped = Gates(problem), [], []
    if layers is None:
        layers = layers_for(options.adapters, options.variants)
    for layer in layers:
        if layer.half_only and problem.dtype == problem.trainable_dtype:
            continue
        row = _row(suite, layer, case, options)
        if suite in layer.not_in and not options.full:
            skipped.append(replace(row, status=SKIPPED, note="takes long: only with --full"))
            continue
        try:
            runner = layer.start(problem)
            row = _gated(layer, runner, gates, row)
            built.append(Built(layer, runner, row))
        except Unavailable as reason:
            skipped.append(replace(row, status=SKIPPED, note=str(reason)))
        except Exception as error:  # a peer that breaks must not take the others' numbers along
            if layer.name.startswith("qrlora_kernels"):
                raise
            skipped.append(
                replace(row, status=SKIPPED, note=f"{type(error).__name__}: {error}"[:200])
            )
    return problem, built, skipped


def _gated(layer: Layer, runner: Runner, gates: Gates, row: Row) -> Row:
    case = gates.problem.case
    if layer.adapter:
        kron = layer.adapter in ("ohora", "lokr")
        rank = case.kron_rank() if kron else min(case.r, case.n, case.k)
        row = replace(row, r=rank if runner.rank is None else runner.rank)
    if (layer.adapter in ADAPTERS or _is_frozen_otherwise(layer)) and runner.equal:
        verdict = gates.judge(layer, runner)
        note = "" if verdict.ok else verdict.detail
        row = replace(row, status=OK if verdict.ok else RED, gate=verdict.excess, note=note)
    elif layer.adapter:
        row = replace(row, status=OTHER)
    choice = qk.backends.last_choice(runner.operation) if runner.operation else None
    return replace(row, backend=choice.name if choice else "")


def _is_frozen_otherwise(layer: Layer) -> bool:
    return not layer.adapter and layer.name != FLOOR


def _row(suite: str, layer: Layer, case: Case, options: Options) -> Row:
    return Row(
        suite,
        layer.name,
        "",
        adapter=layer.adapter,
        m=case.m,
        n=case.n,
        k=case.k,
        r=case.r if layer.adapter else 0,
        dtype=case.dtype,
        device=options.device,
        cache=options.cache,
    )


def timed_rows(
    built: list[tuple[Row, Task]],
    options: Options,
    m: int,
    warmed: bool = False,
    settle: float = 0.0,
) -> list[Row]:
    """Time every task on each clock of the device and give one row per phase and clock.

    ``warmed`` and ``settle`` are :func:`bench.timing.measure`'s.
    """
    rows: list[Row] = []
    clocks: list[tuple[str, Any, dict[int, Task]]] = []
    tasks = {i: task for i, (_, task) in enumerate(built)}
    clocks.append(("wall", WallClock(options.device), tasks))
    if options.device == "cuda":
        clocks.append(("device", EventClock(), tasks))
        if m <= _GRAPH_UP_TO:
            clocks.append(("graph", EventClock(), _graphs(built, rows)))
    for name, clock, chosen in clocks:
        timings = measure(
            {str(i): task for i, task in chosen.items()},
            options.effort,
            options.device,
            clock,
            options.cold,
            lambda share: options.tick(share / len(clocks)),
            warmed,
            settle,
        )
        for i, phases in timings.items():
            row = replace(built[int(i)][0], clock=name)
            rows += [_timed(row, metric, timing) for metric, timing in phases.items()]
    return rows


def _graphs(built: list[tuple[Row, Task]], rows: list[Row]) -> dict[int, Task]:
    """Each task as a CUDA graph; one that cannot be captured gets a row that says so."""
    found = {}
    for i, (row, task) in enumerate(built):
        captured = _captured(task)
        if isinstance(captured, str):
            metric = "both" if len(task) > 1 else next(iter(task))
            rows.append(replace(row, metric=metric, clock="graph", status=SKIPPED, note=captured))
        else:
            found[i] = captured
    return found


def _captured(task: Task) -> Task | str:
    try:
        return graph_task(task)
    except Exception as error:  # whatever a peer does that a graph cannot hold
        torch.cuda.synchronize()
        return f"no CUDA graph: {type(error).__name__}: {error}"[:200]


def _timed(row: Row, metric: str, timing: Timing) -> Row:
    return replace(row, metric=metric, **asdict(timing))


def gate_rows(built: list[Built]) -> list[Row]:
    """What a gate-only pass gives: the verdicts."""
    return [replace(b.row, metric="gate", unit="", value=b.row.gate) for b in built]
