"""Pick the backend of one call from its shape, dtype and device, and say why.

``choose`` takes what was fastest where this machine has been measured (``tuning``). Otherwise it
walks ``BACKENDS`` in order of preference and takes the first that supports the problem and is not
passed over for one that measured faster elsewhere (``measured``). A backend forced by argument, by
:func:`use_backend` or by ``QRLORA_BACKEND`` runs or raises: it is never silently replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

from .. import native
from . import tuning
from .measured import passed_over
from .problem import Choice, Problem

# In order of preference. Modules are imported on first use, so importing the package is cheap.
BACKENDS: dict[str, str] = {
    "amx": "qrlora_kernels.backends.amx",
    "cpu": "qrlora_kernels.backends.cpu",
    "cuda": "qrlora_kernels.backends.cuda",
    "triton": "qrlora_kernels.backends.triton",
    "composed": "qrlora_kernels.backends.composed",
    "reference": "qrlora_kernels.backends.reference",
}

_forced: str | None = None
_last: dict[str, Choice] = {}


@cache
def load(name: str) -> ModuleType:
    """The module of backend ``name``."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {sorted(BACKENDS)}, got {name!r}")
    return importlib.import_module(BACKENDS[name])


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the block on backend ``name``; a call that it cannot run raises ``ValueError``."""
    global _forced
    load(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(problem: Problem, backend: str | None = None) -> Choice:
    """The backend for ``problem``, with the reason.

    Raises
    ------
    ValueError
        If a backend was forced (argument, :func:`use_backend`, ``QRLORA_BACKEND``, in this order)
        and it is unknown or cannot run the problem.
    """
    return _choose(problem, forced_backend(backend))


def choose_freely(problem: Problem) -> Choice:
    """The backend for ``problem`` where none is forced, whatever is forced at the moment."""
    return _choose(problem, None)


def pinned_backend(backend: str | None = None) -> str | None:
    """The backend asked for in code; a forward passes it on, so that its backward agrees."""
    return backend or _forced


def forced_backend(backend: str | None = None) -> str | None:
    """The backend asked for in code or by the environment."""
    return backend or _forced or os.environ.get("QRLORA_BACKEND") or None


def forget() -> None:
    """Choose again for every problem, since what choices depend on has changed."""
    _choose.cache_clear()
    if native.CORE is not None:
        native.CORE.forget_choices()


def plain_choice(op: str, reason: str, backend: str | None = None) -> None:
    """Note that a call of ``op`` is left to the plain expression, the reference, for ``reason``.

    Raises
    ------
    ValueError
        If another backend was forced.
    """
    forced = forced_backend(backend) or "reference"
    load(forced)
    if forced != "reference":
        raise ValueError(f"backend {forced!r} cannot run {op} here: {reason}")
    _last[op] = Choice("reference", reason)


@lru_cache(maxsize=4096)
def _choose(problem: Problem, forced: str | None) -> Choice:
    if forced is not None:
        ok, reason = load(forced).supports(problem)
        if not ok:
            raise ValueError(f"backend {forced!r} cannot run {problem.op} here: {reason}")
        return Choice(forced, "asked for")
    entry = tuning.lookup(problem)
    if entry and entry.winner in BACKENDS and load(entry.winner).supports(problem)[0]:
        return Choice(entry.winner, entry.reason())
    return by_rules(problem)


def by_rules(problem: Problem) -> Choice:
    """The backend for ``problem`` where this machine has not been measured."""
    refusals: list[str] = []
    for name in BACKENDS:
        why_not = passed_over(name, problem)
        ok, reason = (False, why_not) if why_not else load(name).supports(problem)
        if ok:
            return Choice(name, "; ".join([reason, *refusals]))
        refusals.append(f"not {name}: {reason}")
    raise AssertionError("the reference supports every problem")


def run(problem: Problem, step: str, backend: str | None, operands: Sequence[Any]) -> Any:
    """Run ``problem.op``'s ``step`` (``"fwd"`` or ``"bwd"``) on the chosen backend."""
    choice = choose(problem, backend)
    _last[problem.op] = choice
    return getattr(load(choice.name), f"{problem.op}_{step}")(*operands)


def last_choice(op: str) -> Choice | None:
    """The choice made for the last call of ``op`` (as in ``Problem.op``), if there was one."""
    return _last.get(op)


def report() -> dict[str, tuple[bool, str]]:
    """For each backend whether it is available on this machine, and why (not)."""
    return {name: load(name).available() for name in BACKENDS}
