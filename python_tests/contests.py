"""Contests of backends for tests: stand-ins, and a clock that other work does not move."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import benchmark

import qrlora_kernels as qk
from qrlora_kernels.backends import Problem, composed
from qrlora_kernels.dispatch import chooser, tuning
from qrlora_kernels.dispatch.problem import Recipe

CPU = torch.device("cpu")
PROBLEM = Problem("qr_linear", CPU, torch.float32, 16, 24, 36, 4)


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("QRLORA_TUNING", raising=False)
    tuning.clear()
    chooser.forget()
    yield
    tuning.clear()
    chooser.forget()


class Clock:
    """Goes on by a little whenever it is read, and by what a step is said to cost.

    So no test depends on what else the machine does.
    """

    READING = 1e-3

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += self.READING
        return self.now


@pytest.fixture(name="clock", autouse=True)
def clock_of_steps(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(benchmark, "Timer", functools.partial(benchmark.Timer, timer=clock))
    return clock


def model_of(adapter: str = "qr", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 32)).to(dtype)
    options |= {} if adapter == "ohora" else {"rank": 4}
    return qk.adapt(model, ["0", "2"], adapter=adapter, progress=False, **options)


def tune(model: nn.Module, tokens: tuple[int, ...] = (3,), **options: Any) -> Any:
    return qk.tune(model, tokens, seconds=0.001, progress=False, **options)


class Backend:
    """A stand-in for a backend module: library products, with a step changed."""

    def __init__(self, name: str, change: Callable[..., Any]) -> None:
        self.name, self.change = name, change

    def supports(self, problem: Problem) -> list[Recipe]:
        return [Recipe(self.name, "test", "for the test")]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda p, recipe: self.change(name, getattr(composed, name)(p, "addmm"))


@pytest.fixture(name="only")
def only_these(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Callable[..., Any]]], None]:
    """Let there be these backends, in this order of preference, and no other."""

    def install(changes: dict[str, Callable[..., Any]]) -> None:
        there = {name: Backend(name, change) for name, change in changes.items()}
        monkeypatch.setattr(chooser, "BACKENDS", dict.fromkeys(there, ""))
        original = chooser.load
        monkeypatch.setattr(chooser, "load", lambda name: there.get(name) or original(name))
        monkeypatch.setattr(chooser, "passed_over", lambda *of: None)
        chooser.forget()

    return install


def same(name: str, results: Any) -> Any:
    return results


@pytest.fixture(name="slow")
def slow_step(clock: Clock) -> Callable[..., Any]:
    return taking(clock, lambda: 3e-4)


def taking(clock: Clock, cost: Callable[[], float]) -> Callable[..., Any]:
    """A backend whose forward and backward take so many seconds each."""

    def change(name: str, results: Any) -> Any:
        clock.now += cost()
        return results

    return change
