"""Interleaved timing: every variant takes its turn in every round, in two runs."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from .registry import Effort

Step = Callable[[Any], Any]
Task = dict[str, Step]  # phases in order; each is handed what the one before returned
Round = dict[str, list[list[float]]]  # samples by task, seconds by phase

_FLUSH_BYTES = 256 << 20
_VISIT_SECONDS = 0.002  # short calls are repeated for this long in each turn
_WARM_BELOW = 0.02  # a longer call finds its operands out of cache anyway
_WARM_ENOUGH = 0.1  # nor does it gain by a third call before it is timed
_NARROW = 1.05  # nor by a third in the same run, where two are this close
_ONCE_ABOVE = 1.0  # and one of seconds is run once per run only
_ENOUGH_TASKS = 4  # to tell a slow round from a slow task


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median over both runs, 20 % and 80 % quantiles, and each run's median.

    Of samples from which the machine's drift between rounds is taken out, see :func:`measure`.
    """

    value: float
    q20: float
    q80: float
    first: float
    second: float


class WallClock:
    """Host time of each phase, the device waited for at both ends."""

    name = "wall"

    def __init__(self, device: str) -> None:
        self._sync = torch.cuda.synchronize if device == "cuda" else lambda: None

    def sample(self, task: Task, flush: Callable[[], None]) -> list[float]:
        times, state = [], None
        flush()
        for step in task.values():
            self._sync()
            begin = time.perf_counter()
            state = step(state)
            self._sync()
            times.append(time.perf_counter() - begin)
        return times


class EventClock:
    """Device time between CUDA events, so that Python's dispatch is hidden where work queues up."""

    name = "device"

    def sample(self, task: Task, flush: Callable[[], None]) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(task) + 1)]
        state = None
        flush()  # also keeps the device busy while the host runs ahead
        marks[0].record()
        for step, mark in zip(task.values(), marks[1:], strict=True):
            state = step(state)
            mark.record()
        marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def measure(
    tasks: dict[str, Task],
    effort: Effort,
    device: str,
    clock: WallClock | EventClock | None = None,
    cold: bool = False,
    tick: Callable[[float], None] = lambda share: None,
    warmed: bool = False,
    settle: float = 0.0,
) -> dict[str, dict[str, Timing]]:
    """Time each task's phases, and their sum as ``both`` where there are several.

    With four tasks and more, a round that was slow for all of them counts as a usual one: its
    samples are divided by the median of what they are over their tasks' medians.

    Parameters
    ----------
    tasks : dict of Task
    effort : Effort
        Seconds for all tasks together, and the bounds on the number of rounds.
    device : "cpu" or "cuda"
    clock : WallClock or EventClock, optional
    cold : bool
        Evict caches (L2 on a GPU) before every sample.
    tick : callable
        Told the share of the work that was just done.
    warmed : bool
        Each task has run before, so that a long one need not run twice to be warm.
    settle : float
        Seconds of rest before each task's turn, for the threads of the one before to fall asleep.
    """
    clock = clock or WallClock(device)
    flush = _flusher(device) if cold else lambda: None
    repeats = {name: _warm_up(task, clock, warmed) for name, task in tasks.items()}
    runs: list[list[Round]] = []
    with _quiet():
        for _ in range(2):
            rounds: list[Round] = []
            before = 0.0
            for done, names in _rounds(list(tasks), effort):
                tick((done - before) / 2)
                before = done
                rounds.append({})
                for name in names:
                    task = tasks[name]
                    if _known_well(_samples(rounds, name), repeats[name]):
                        continue
                    time.sleep(settle)
                    if not cold and repeats[name] > 1:
                        clock.sample(task, flush)
                    count = max(repeats[name], 1)
                    rounds[-1][name] = [clock.sample(task, flush) for _ in range(count)]
            tick((1.0 - before) / 2)
            runs.append(rounds)
    runs = _levelled(runs)
    return {
        name: _summarise(list(task), [_samples(run, name) for run in runs])
        for name, task in tasks.items()
    }


def _samples(rounds: list[Round], name: str) -> list[list[float]]:
    return [sample for one in rounds for sample in one.get(name, [])]


def _levelled(runs: list[list[Round]]) -> list[list[Round]]:
    """The samples of each round divided by how much slower than usual it was for all its tasks.

    What else runs on a machine slows it down for seconds, longer than a round and shorter than
    the whole, and would leave a task's median to the rounds in which it happened to be quick.
    """
    everything = [one for rounds in runs for one in rounds]
    names = {name for one in everything for name in one}
    usual = {name: median(map(sum, _samples(everything, name))) for name in names}

    def slowness(one: Round) -> float:
        if len(one) < _ENOUGH_TASKS:
            return 1.0
        return median(median(map(sum, own)) / usual[name] for name, own in one.items())

    def level(one: Round) -> Round:
        slower = slowness(one)
        return {name: [[t / slower for t in s] for s in own] for name, own in one.items()}

    return [[level(one) for one in rounds] for rounds in runs]


def _rounds(names: list[str], effort: Effort) -> Iterator[tuple[float, list[str]]]:
    """Half of the effort: (how much is done, order); a new order each time, so that what one task
    leaves behind (warm caches, threads that still spin) meets all of the others alike."""
    begin, number = time.perf_counter(), 0
    least, most = -(-effort.min_rounds // 2), -(-effort.max_rounds // 2)
    done = 0.0
    while done < 1.0:
        yield done, random.Random(number).sample(names, len(names))
        number += 1
        spent = (time.perf_counter() - begin) / (effort.seconds / 2)
        done = max(min(spent, number / least), number / most)


def _warm_up(task: Task, clock: WallClock | EventClock, warmed: bool) -> int:
    """Run a task until it is warm (compiled, allocated).

    Returns how often it fits into one turn; 0 if it is to run once per run only.
    """
    seconds = 0.0
    for number in range(3):
        begin = time.perf_counter()
        clock.sample(task, lambda: None)
        seconds = time.perf_counter() - begin
        if (number or warmed) and seconds > _WARM_ENOUGH:  # a first call may also have compiled
            break
    if seconds > _ONCE_ABOVE:
        return 0
    if seconds > _WARM_BELOW:
        return 1
    return min(20, max(2, int(_VISIT_SECONDS / max(seconds, 1e-6))))


def _known_well(samples: list[list[float]], repeats: int) -> bool:
    """Whether a long call may sit out the rest of a run: more samples would say the same."""
    if repeats == 0:
        return bool(samples)
    if len(samples) < 2:
        return False
    times = [sum(sample) for sample in samples]
    return min(times) > _WARM_ENOUGH and max(times) < _NARROW * min(times)


def _flusher(device: str) -> Callable[[], None]:
    buffer = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    return lambda: buffer.zero_()  # type: ignore[return-value]


@contextmanager
def _quiet() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _summarise(phases: list[str], runs: list[list[list[float]]]) -> dict[str, Timing]:
    series = {name: [[s[i] for s in run] for run in runs] for i, name in enumerate(phases)}
    if len(phases) > 1:
        series["both"] = [[sum(s) for s in run] for run in runs]
    return {name: timing(*two) for name, two in series.items()}


def timing(first: list[float], second: list[float]) -> Timing:
    """Sum up the samples of two runs, in seconds."""
    pooled = torch.tensor(first + second, dtype=torch.float64) * 1e3
    q20, middle, q80 = pooled.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    each = [float(torch.tensor(run, dtype=torch.float64).median()) * 1e3 for run in (first, second)]
    return Timing(middle, q20, q80, *each)


def graph_task(task: Task) -> Task:
    """The same phases captured as one CUDA graph, replayed as ``both`` (or the single phase)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _run(task)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = _run(task)  # outputs must outlive the graph's replays
    name = "both" if len(task) > 1 else next(iter(task))

    def replay(_: Any) -> Any:
        graph.replay()
        return kept

    return {name: replay}


def _run(task: Task) -> Any:
    state = None
    for step in task.values():
        state = step(state)
    return state
