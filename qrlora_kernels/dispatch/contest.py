"""The recipes against each other on one problem: which is fastest, and is the time believable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from ..operands import (
    KeptOperands,
    LinearAdd,
    Operands,
    kron,
    kron_gradient,
    low_rank,
    low_rank_gradient,
)
from ..panels import Panels
from ..reference import accumulation_dtype
from . import chooser
from .problem import Choice, Problem, Recipe, joined

# Who is to replace the rules' choice must be faster by this factor, in this share of the rounds.
_AHEAD, _ROUNDS_WON = 1.02, 0.75
_VISIT = 0.01  # seconds of one recipe's turn in a round
_ROUNDS = 8  # at least
_ATTEMPTS = 3  # at a measurement that can be believed
# ‖difference‖ / ‖library products‖ of each result; half precision rounds h and g too.
_AGREES = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-4, torch.float64: 1e-10}
# What a slow machine with nothing else to do has done its work in: seconds for the calls of a step,
# operations a second. Two cores with AVX2 do some 20 to 100 times 1e9 in fp32 and fp64, and 2.5
# times 1e9 in half precision, for which they have no instructions; on GPUs the least is the fp64 of
# consumer chips.
_CALLS = 3e-3
_SLOWEST = {
    "cpu": {2: 3e8, 4: 2e9, 8: 2e9},  # by the bytes of a number
    "cuda": {2: 2e11, 4: 2e11, 8: 5e10},
}
_UNEVEN = 2.0  # median over the least of the rounds


@dataclass(frozen=True)
class Contest:
    """One problem: seconds of the step by recipe ("backend:recipe"), and why others are not there.

    ``rules`` is what would run it without a measurement. ``doubt`` says why the times are not to be
    believed, and so are not used; empty where they are.
    """

    problem: Problem
    winner: str
    rules: str
    seconds: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)
    doubt: str = ""


def contest(problem: Problem, seconds: float) -> Contest:
    """Time every recipe that runs ``problem`` and is right, again while the times are doubtful."""
    problem = joined(problem)
    operands = _operands(problem)
    step = f"{problem.op}_{problem.step}"
    (*_, truth_by) = chooser.recipes("composed", problem)
    truth = _runner(truth_by, step, operands)()
    runners: dict[str, Callable[[], list[Tensor]]] = {}
    left_out = {}
    for backend in chooser.BACKENDS:
        for recipe in chooser.recipes(backend, problem) if backend != "reference" else ():
            name = f"{recipe.backend}:{recipe.name}"
            runner = _runner(recipe, step, operands)
            if why := _fault(runner, truth, problem.dtype):
                left_out[name] = why
            else:
                runners[name] = runner
    for _ in range(_ATTEMPTS):
        found = _judged(problem, _time(runners, seconds), left_out)
        if not found.doubt:
            break
    return found


def _judged(problem: Problem, samples: dict[str, list[float]], left_out: dict[str, str]) -> Contest:
    recipe, _ = chooser.by_rules(problem)
    rules = f"{recipe.backend}:{recipe.name}"
    times = {name: median(samples[name]) for name in samples}
    ordered = dict(sorted(times.items(), key=lambda item: item[1]))
    fastest = next(iter(ordered))
    unsure = rules in samples and not _beats(samples[fastest], samples[rules])
    deciding = [name for name in (fastest, rules) if name in samples]
    doubts = (f"{name} took {why}" for name in deciding if (why := _doubt(problem, samples[name])))
    winner = rules if unsure else fastest
    return Contest(problem, winner, rules, ordered, left_out, next(doubts, ""))


def _doubt(problem: Problem, rounds: list[float]) -> str:
    """What only other work explains about the times of one recipe, if anything.

    It may slow every round alike, for threads that wait for each other get the cores by turns of
    the system's scheduler, or some of the rounds.
    """
    taken, least, enough = median(rounds), min(rounds), _enough(problem)
    if taken > enough:
        return f"{1e3 * taken:.3g} ms, where {1e3 * enough:.3g} ms are enough on a slow machine"
    if taken > _UNEVEN * least:
        return f"{1e6 * least:.0f} µs in one round and {1e6 * taken:.0f} µs in most"
    return ""


def _enough(problem: Problem) -> float:
    """Seconds in which a slow machine has done a step.

    Operations are counted, not bytes: every number of a weight takes part in two for each token.
    """
    p = problem
    products = 2 if p.step == "bwd" else 1
    operations = products * 2 * p.m * (p.n * p.k + p.r * (p.n + p.k))
    return _CALLS + operations / _SLOWEST[p.device.type][p.dtype.itemsize]


def _beats(one: list[float], other: list[float]) -> bool:
    """Whether it is faster for certain: other work on the machine comes and goes between rounds."""
    won = sum(a < b for a, b in zip(one, other, strict=True))
    return median(other) > _AHEAD * median(one) and won >= _ROUNDS_WON * len(one)


def _fault(step: Callable[[], list[Tensor]], truth: list[Tensor], dtype: torch.dtype) -> str | None:
    """Why a recipe's results are not to be had or not to be trusted."""
    try:
        results = step()
    except Exception as error:  # a compiler's or a driver's own: what it is does not matter
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for got, want in zip(results[: len(truth)], truth, strict=True):  # not what it hands on
        off = float((got.double() - want.double()).norm() / want.double().norm())
        if not off <= _AGREES[dtype]:
            return f"results differ from the library products' by {off:.1e} of their norm"
    return None


def _time(runners: dict[str, Callable[[], list[Tensor]]], seconds: float) -> dict[str, list[float]]:
    """Seconds of a step in each of the rounds in which all take their turn."""
    from torch.utils.benchmark import Timer  # it brings a C++ compiler's set-up along

    threads = torch.get_num_threads()
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=threads)
        for name, step in runners.items()
    }
    first = {name: timer.timeit(2).median for name, timer in timers.items()}
    numbers = {name: max(1, int(_VISIT / max(once, 1e-7))) for name, once in first.items()}
    a_round = sum(numbers[name] * first[name] for name in timers)
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(max(_ROUNDS, int(seconds / a_round))):
        for name, timer in timers.items():
            samples[name].append(timer.timeit(numbers[name]).median)
    return samples


def _runner(recipe: Recipe, step: str, operands: Operands) -> Callable[[], list[Tensor]]:
    """The results of the step by ``recipe``."""
    choice = Choice(recipe.backend, recipe.name, recipe.reason)

    def run() -> list[Tensor]:
        results = chooser.perform(choice, step, operands)
        found = [results] if isinstance(results, Tensor) else results
        return [t for t in found if t is not None]

    return run


def _operands(p: Problem) -> Operands:
    """Random operands, y of the size of x; trainables in fp32 over half precision."""
    generator = torch.Generator(p.device).manual_seed(0)
    wide = accumulation_dtype(p.dtype)

    def draw(*shape: int, size: float = 1.0, dtype: torch.dtype = p.dtype) -> Tensor:
        t = torch.randn(shape, generator=generator, device=p.device, dtype=wide)
        return (size * t).to(dtype)

    m, n, k, r, back = p.m, p.n, p.k, p.r, p.step == "bwd"
    x, dy, bias = draw(m, k), draw(m, n), draw(n) if p.bias else None
    weight = draw(n, k, size=k**-0.5)
    if p.layout == "columns":
        weight = weight.mT.contiguous().mT
    elif p.layout == "strided":
        weight = weight.repeat_interleave(2, 1)[:, ::2]
    if p.op == "linear_add":
        return LinearAdd(x, weight, bias, draw(m, n))
    if p.op == "kron":
        rows = (n // r, k // r, n // r, k // r)
        a, b, a0, b0 = (draw(count, r, size=r**-0.5, dtype=wide) for count in rows)
        matrix = Panels(weight.mT if back else weight) if p.layout == "panels" else None
        if back:
            return kron_gradient(dy, x, weight, a, b, a0, b0, 1.0, *p.needs, matrix)
        return kron(x, weight, bias, a, b, a0, b0, 1.0, matrix)
    up, down = draw(n, r, size=n**-0.5), draw(r, k, size=r**-0.5)
    gate = draw(r, dtype=wide) if p.gate == "vector" else draw(r, r, size=r**-0.5, dtype=wide)
    frozen = (weight.mT, up.mT, down.mT) if back else (weight, down, up)
    kept = KeptOperands(*map(Panels, frozen)) if p.layout == "panels" else None
    if not back:
        return low_rank(x, weight, bias, up, down, gate, None, 1.0, kept)
    h = (x @ down.mT).to(p.dtype)
    return low_rank_gradient(dy, weight, up, down, gate, None, h, 1.0, *p.needs, kept)
