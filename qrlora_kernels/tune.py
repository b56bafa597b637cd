"""Measure the backends on this machine, for the layers of one model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .backends import chooser, tuning
from .backends.problem import Problem
from .model.adapt import require_adapted
from .ops.common import outside_autocast

TOKENS = (1, 16, 128, 512, 2048)
# Who is to replace the rules' choice must be faster by this factor, in this share of the rounds.
_AHEAD, _ROUNDS_WON = 1.02, 0.75
_VISIT = 0.01  # seconds of one backend's turn in a round
_ROUNDS = 8  # at least
# ‖difference‖ / ‖library products‖ of y and each gradient; half precision rounds h and g too.
_AGREES = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass(frozen=True)
class Contest:
    """One problem: seconds of a forward and backward by backend, and why others are not there.

    ``rules`` is who would have it without a measurement.
    """

    problem: Problem
    winner: str
    rules: str
    seconds: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune` found; prints as a table."""

    contests: list[Contest]

    def __str__(self) -> str:
        lines = []
        for c in self.contests:
            p = c.problem
            dtype = str(p.dtype).removeprefix("torch.")
            times = ", ".join(f"{name} {1e6 * s:.0f}" for name, s in c.seconds.items())
            change = "" if c.winner == c.rules else f" (by the rules {c.rules})"
            lines.append(
                f"{p.op:14s} {p.m:6d} tokens  {p.n}x{p.k} r={p.r} {dtype}: {c.winner}{change}; "
                f"µs: {times}"
            )
            lines += [f"{'':14s} left out {name}: {why}" for name, why in c.left_out.items()]
        return "\n".join(lines)


def tune(
    model: nn.Module,
    tokens: Sequence[int] = TOKENS,
    *,
    path: str | os.PathLike[str] | None = None,
    seconds: float = 0.3,
    progress: bool = True,
) -> Tuning:
    """Time every backend on the layers that ``model`` adapts, and use the fastest from now on.

    The built-in rules were measured on other machines, and no rule prefers the GPU kernels. Here
    each backend that can run a problem takes its turn, forward and backward, in interleaved rounds.
    One whose results differ from the library products', or that fails, is left out. The measurement
    counts from half to twice its tokens, for the same chip and number of threads, in this process
    and in every one whose ``QRLORA_TUNING`` names the file. It is for the mode that the model is
    in: layers with dropout take another way in training, and autocast another dtype. Nothing else
    should run on the machine meanwhile; after an update of PyTorch or a driver, tune again.

    Parameters
    ----------
    model : nn.Module
        With adapted layers, on the device that it will run on.
    tokens : sequence of int
        Numbers of tokens to measure: batch times length in training, batch when decoding.
    path : path, optional
        Where to write all that was measured, as JSON; what the file holds of others is kept.
    seconds : float
        For each problem, once its kernels are compiled.
    progress : bool
        Show a progress bar.

    Raises
    ------
    TypeError, ValueError
        If the model has no adapted layer or none that is not merged, a number of tokens or the
        seconds are not positive, a backend is forced, or ``path`` holds something else.
    """
    if not isinstance(tokens, Sequence):
        raise TypeError(f"tokens must be a sequence of integers, got {tokens!r}")
    if not tokens or any(type(m) is not int or m < 1 for m in tokens):
        raise ValueError(f"tokens must be positive integers, got {tokens!r}")
    layers = [layer for layer in require_adapted(model).values() if not layer.merged]
    if not layers:
        raise ValueError("model must have adapted layers that are not merged, got none")
    problems = [layer.problem(m) for layer in layers for m in sorted(set(tokens))]
    return tune_problems(problems, path=path, seconds=seconds, progress=progress)


def tune_problems(
    problems: Iterable[Problem],
    *,
    path: str | os.PathLike[str] | None = None,
    seconds: float = 0.3,
    progress: bool = True,
) -> Tuning:
    """:func:`tune` for problems that need no model, of shapes as ``functional`` takes them."""
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds!r}")
    if forced := chooser.forced_backend():
        raise ValueError(f"no backend may be forced while tuning, got {forced!r}")
    distinct = list(dict.fromkeys(problems))
    for problem in distinct:
        if problem.device.type not in ("cpu", "cuda"):
            raise ValueError(f"model must be on a CPU or CUDA device, got {problem.device}")
    if path is not None and Path(path).exists():
        tuning.read(path)  # what it holds is kept
    elif path is not None and os.environ.get("QRLORA_TUNING") == os.fspath(path):
        tuning.write(path)  # the file to be is named already
    contests = []
    try:
        for problem in tqdm(distinct, "tune", disable=not progress):
            with torch.no_grad(), outside_autocast(problem.device.type):
                contests.append(_contest(problem, seconds))
            tuning.add([_entry(contests[-1])])
            if path is not None:
                tuning.write(path)  # at once: what is measured is not lost to what comes
    finally:
        chooser.forget()
    return Tuning(contests)


def _entry(contest: Contest) -> tuning.Entry:
    winner = contest.winner
    others = {s: name for name, s in contest.seconds.items() if name != winner}
    if not others:
        return tuning.entry_for(contest.problem, winner)
    best = min(others)
    return tuning.entry_for(
        contest.problem, winner, others[best], round(contest.seconds[winner] / best, 3)
    )


# --- one problem --------------------------------------------------------------------------------


def _contest(problem: Problem, seconds: float) -> Contest:
    rules = chooser.by_rules(problem).name
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
    samples = _time(runners, seconds)
    times = {name: median(samples[name]) for name in samples}
    ordered = dict(sorted(times.items(), key=lambda item: item[1]))
    winner = next(iter(ordered))
    if rules in samples and not _beats(samples[winner], samples[rules]):
        winner = rules
    return Contest(problem, winner, rules, ordered, left_out)


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
