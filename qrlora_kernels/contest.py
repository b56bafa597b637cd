"""The backends against each other on one problem: who is fastest, and can the times be believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .backends import chooser
from .backends.problem import Problem

# Who is to replace the rules' choice must be faster by this factor, in this share of the rounds.
_AHEAD, _ROUNDS_WON = 1.02, 0.75
_VISIT = 0.01  # seconds of one backend's turn in a round
_ROUNDS = 8  # at least
_ATTEMPTS = 3  # at a measurement that can be believed
# ‖difference‖ / ‖library products‖ of y and each gradient; half precision rounds h and g too.
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
    """One problem: seconds of a forward and backward by backend, and why others are not there.

    ``rules`` is who would have it without a measurement. ``doubt`` says why the times are not to be
    believed, and so are not used; empty where they are.
    """

    problem: Problem
    winner: str
    rules: str
    seconds: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)
    doubt: str = ""


def contest(problem: Problem, seconds: float) -> Contest:
    """Time every backend that runs ``problem`` and is right, again while the times are doubtful."""
    operands = _operands(problem)
    truth = _step(problem, operands, "composed")()
    runners: dict[str, Callable[[], list[Tensor]]] = {}
    left_out = {}
    for name in chooser.BACKENDS:
        if name == "reference" or not chooser.load(name).supports(problem)[0]:
            continue
        step = _step(problem, operands, name)
        if why := _fault(step, truth, problem.dtype):
            left_out[name] = why
        else:
            runners[name] = step
    for _ in range(_ATTEMPTS):
        found = _judged(problem, _time(runners, seconds), left_out)
        if not found.doubt:
            break
    return found


def _judged(problem: Problem, samples: dict[str, list[float]], left_out: dict[str, str]) -> Contest:
    rules = chooser.by_rules(problem).name
    times = {name: median(samples[name]) for name in samples}
    ordered = dict(sorted(times.items(), key=lambda item: item[1]))
    fastest = next(iter(ordered))
    unsure = rules in samples and not _beats(samples[fastest], samples[rules])
    deciding = [name for name in (fastest, rules) if name in samples]
    doubts = (f"{name} took {why}" for name in deciding if (why := _doubt(problem, samples[name])))
    winner = rules if unsure else fastest
    return Contest(problem, winner, rules, ordered, left_out, next(doubts, ""))


def _doubt(problem: Problem, rounds: list[float]) -> str:
    """What only other work explains about the times of one backend, if anything.

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
    """Seconds in which a slow machine has done a step, forward and backward.

    Operations are counted, not bytes: every number of a weight takes part in two for each token.
    """
    _, device, dtype, m, n, k, r = problem
    products = 1 if problem.op == "linear_add" else 3
    operations = products * 2 * m * (n * k + r * (n + k))
    return _CALLS + operations / _SLOWEST[device.type][dtype.itemsize]


def _beats(one: list[float], other: list[float]) -> bool:
    """Whether it is faster for certain: other work on the machine comes and goes between rounds."""
    won = sum(a < b for a, b in zip(one, other, strict=True))
    return median(other) > _AHEAD * median(one) and won >= _ROUNDS_WON * len(one)


def _fault(step: Callable[[], list[Tensor]], truth: list[Tensor], dtype: torch.dtype) -> str | None:
    """Why a backend's results are not to be had or not to be trusted."""
    try:
        results = step()
    except Exception as error:  # a compiler's or a driver's own: what it is does not matter
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for got, want in zip(results, truth, strict=True):
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


def _step(problem: Problem, operands: dict[str, Any], backend: str) -> Callable[[], list[Tensor]]:
    """y and every gradient, on ``backend``."""
    module = chooser.load(backend)
    forward = getattr(module, f"{problem.op}_fwd")
    backward = getattr(module, f"{problem.op}_bwd", None) if problem.op != "linear_add" else None
    x, dy, weight, bias, *factors = operands.values()
    needed = (True,) * (3 if problem.op == "kron_linear" else 2)

    def run() -> list[Tensor]:
        if backward is None:  # the gradients of a sum need no kernel
            return [forward(x, weight, bias, *factors)]
        results = forward(x, weight, bias, *factors, 1.0)
        if problem.op == "kron_linear":
            return [results, *backward(dy, x, weight, *factors, 1.0, *needed)]
        y, h = results
        return [y, *backward(dy, weight, *factors, h, 1.0, *needed)]

    return run


def _operands(problem: Problem) -> dict[str, Any]:
    """Random operands, y of the size of x; trainables in fp32 over half precision."""
    _, device, dtype, m, n, k, r = problem
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

    def draw(*shape: int, size: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        t = torch.randn(shape, generator=generator, device=device, dtype=wide)
        return (size * t).to(dtype)

    found = {
        "x": draw(m, k),
        "dy": draw(m, n),
        "weight": draw(n, k, size=k**-0.5),
        "bias": draw(n),
    }
    if problem.op == "linear_add":
        return found | {"addend": draw(m, n)}
    if problem.op == "kron_linear":
        shapes = {"a": n // r, "b": k // r, "a0": n // r, "b0": k // r}
        return found | {
            name: draw(rows, r, size=r**-0.5, dtype=wide) for name, rows in shapes.items()
        }
    up, down = draw(n, r, size=n**-0.5), draw(r, k, size=r**-0.5)
    if problem.op == "qr_linear":
        return found | {"q": up, "r": down, "lam": draw(r, dtype=wide)}
    return found | {"a": down, "b": up, "core": draw(r, r, size=r**-0.5, dtype=wide)}
