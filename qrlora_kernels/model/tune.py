"""Measure the recipes of the backends on this machine, for the layers of one model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ..autocast import outside_autocast
from ..dispatch import chooser, tuning
from ..dispatch.contest import Contest, contest
from ..dispatch.problem import Problem, joined
from ..files import as_path
from .adapt import require_adapted

TOKENS = (1, 16, 128, 512, 2048)


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
            result = "not used" if c.doubt else f"{c.winner}{change}"
            lines.append(
                f"{p.public_name} {p.step} {p.m:6d} tokens  {p.n}x{p.k} r={p.r} {dtype}: {result}; "
                f"µs: {times}"
            )
            if c.doubt:
                lines.append(f"    cannot be believed: {c.doubt}")
            lines += [f"    left out {name}: {why}" for name, why in c.left_out.items()]
        return "\n".join(lines)


def tune(
    model: nn.Module,
    tokens: Sequence[int] = TOKENS,
    *,
    path: str | os.PathLike[str] | None = None,
    seconds: float = 0.3,
    progress: bool = True,
) -> Tuning:
    """Time every recipe on the layers that ``model`` adapts, and use the fastest from now on.

    The built-in rules were measured on other machines, and no rule prefers the GPU kernels. Here
    each recipe of each backend that can run a step takes its turn in interleaved rounds, forward
    and backward apart. One whose results differ from the library products', or that fails, is left
    out. The measurement counts from half to twice its tokens, for the same chip and number of
    threads, in this process and in every one whose ``QRLORA_TUNING`` names the file. It is for the
    mode that the model is in: layers with dropout take another way in training, and autocast
    another dtype. After an update of PyTorch or a driver, tune again.

    Nothing else should run on the machine meanwhile. Times that only other work explains, longer
    than a slow machine needs or uneven from round to round, are taken again. Are they no better,
    they are not used: what was known of the problem stays, here and in the file, and a warning says
    so.

    Parameters
    ----------
    model : nn.Module
        With adapted layers, on the device that it will run on.
    tokens : sequence of int
        Numbers of tokens to measure: batch times length in training, batch when decoding.
    path : path, optional
        Where to write all that was measured, as JSON; what the file holds of others is kept.
    seconds : float
        For each step, once its kernels are compiled.
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
    problems = [
        layer.problem(m, step)
        for layer in layers
        for m in sorted(set(tokens))
        for step in layer.steps()
    ]
    # Of the output form there is one recipe: nothing to choose.
    problems = [problem for problem in problems if problem.form == "two_sided"]
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
    if path is not None:
        as_path("path", path)  # checked, and used as it is: QRLORA_TUNING may name it so
    if forced := chooser.forced_backend():
        raise ValueError(f"no backend may be forced while tuning, got {forced!r}")
    distinct = list(dict.fromkeys(map(joined, problems)))
    for problem in distinct:
        if problem.device.type not in ("cpu", "cuda"):
            raise ValueError(f"model must be on a CPU or CUDA device, got {problem.device}")
        if problem.gate.startswith("mixed") or problem.form != "two_sided":
            raise ValueError(
                "problems must have one gate and the two-sided form, got gate "
                f"{problem.gate!r} and form {problem.form!r}"
            )
    if path is not None and Path(path).exists():
        tuning.read(path)  # what it holds is kept
    elif path is not None and os.environ.get("QRLORA_TUNING") == os.fspath(path):
        tuning.write(path)  # the file to be is named already
    contests = []
    try:
        for problem in tqdm(distinct, "tune", disable=not progress):
            with torch.no_grad(), outside_autocast(problem.device.type):
                contests.append(contest(problem, seconds))
            if not contests[-1].doubt:
                tuning.add([_entry(contests[-1])])
            if path is not None:
                tuning.write(path)  # at once: what is measured is not lost to what comes
    finally:
        chooser.forget()
    _warn_of_doubts(contests)
    return Tuning(contests)


def _warn_of_doubts(contests: list[Contest]) -> None:
    doubts = [c.doubt for c in contests if c.doubt]
    if doubts:
        warnings.warn(
            f"the times of {len(doubts)} of {len(contests)} problems cannot be believed and are "
            f"not used; does other work run on this machine? The first: {doubts[0]}",
            stacklevel=3,
        )


def _entry(found: Contest) -> tuning.Entry:
    backend, _, recipe = found.winner.partition(":")
    others = {s: name for name, s in found.seconds.items() if name != found.winner}
    if not others:
        return tuning.entry_for(found.problem, backend, recipe=recipe)
    best = min(others)
    over = round(found.seconds[found.winner] / best, 3)
    return tuning.entry_for(found.problem, backend, others[best], over, recipe)
