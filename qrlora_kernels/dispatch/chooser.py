"""Pick the backend and the recipe of one step, and say why; nobody else does.

``choose`` takes what was fastest where this machine has been measured (``tuning``). Otherwise it
walks ``BACKENDS`` in order of preference, and each backend's recipes in the backend's own, and
takes the first that is not passed over for one that measured faster elsewhere (``rules``). A
backend forced by argument, by :func:`use_backend` or by ``QRLORA_BACKEND`` runs or raises: it is
never silently replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch

from .. import native
from ..operands import Operands
from . import tuning
from .problem import OPERATIONS, PUBLIC_NAMES, Choice, Problem, Recipe, joined, problem_of
from .rules import passed_over

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
# (public name, step) -> the choice of the last call. A key is taken out before it is set, so that
# the last key is that of the last call; the native core does the same.
_last: dict[tuple[str, str], Choice] = {}


@cache
def load(name: str) -> ModuleType:
    """The module of backend ``name``."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {sorted(BACKENDS)}, got {name!r}")
    return importlib.import_module(BACKENDS[name])


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the block on backend ``name``, or on one recipe of it ("composed:addmm").

    A call that it cannot run raises ``ValueError``.
    """
    global _forced
    load(name.partition(":")[0])
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def pinned_backend(backend: str | None = None) -> str | None:
    """The backend asked for, in code or by the environment: a forward passes it on, so that its
    backward agrees."""
    if torch.compiler.is_compiling():
        return backend or _forced  # what was traced runs in many environments
    return backend or _forced or os.environ.get("QRLORA_BACKEND") or None


def forced_backend(backend: str | None = None) -> str | None:
    """The backend asked for in code or by the environment."""
    return backend or _forced or os.environ.get("QRLORA_BACKEND") or None


def choose(problem: Problem, backend: str | None = None) -> Choice:
    """The backend and recipe for ``problem``, with the reason.

    Raises
    ------
    ValueError
        If a backend was forced (argument, :func:`use_backend`, ``QRLORA_BACKEND``, in this order)
        and it is unknown or cannot run the problem; or if there is no such problem.
    """
    asked = joined(problem)
    if (asked.op, asked.gate) not in PUBLIC_NAMES or asked.step not in ("fwd", "bwd"):
        raise ValueError(
            f"problem must be of a known op, gate and step, got {problem.op!r}, "
            f"{problem.gate!r} and {problem.step!r}"
        )
    return _choose(asked, forced_backend(backend), _threads())


def choose_freely(problem: Problem) -> Choice:
    """The choice for ``problem`` where none is forced, whatever is forced at the moment."""
    return _choose(joined(problem), None, _threads())


def _threads() -> int:
    """Measurements are filed under the number of threads, which is no part of a problem."""
    return torch.get_num_threads() if tuning.table else 0


def forget() -> None:
    """Choose again for every problem, since what choices depend on has changed."""
    _choose.cache_clear()
    if native.CORE is not None:
        native.CORE.forget_choices()


def autograd_choice(op: str, reason: str, backend: str | None = None) -> None:
    """Note that a call of ``op`` is left to the plain expression, the reference, for ``reason``.

    Raises
    ------
    ValueError
        If another backend was forced.
    """
    forced = (forced_backend(backend) or "reference").partition(":")[0]
    load(forced)
    if forced != "reference":
        raise ValueError(f"backend {forced!r} cannot run {op} here: {reason}")
    _last.pop((op, "fwd"), None)
    _last[op, "fwd"] = Choice("reference", "autograd", reason)


@lru_cache(maxsize=4096)
def _choose(problem: Problem, forced: str | None, threads: int) -> Choice:
    if forced is not None:
        recipe, reason = _forced_recipe(problem, *forced.partition(":")[::2]), "asked for"
    else:
        recipe, reason = _measured(problem) or by_rules(problem)
    return Choice(recipe.backend, recipe.name, reason)


def _measured(problem: Problem) -> tuple[Recipe, str] | None:
    """What was fastest where this machine has been measured."""
    entry = tuning.lookup(problem)
    if entry and entry.winner in BACKENDS:
        for recipe in recipes(entry.winner, problem):
            if entry.recipe in ("", recipe.name):
                return recipe, entry.reason()
    return None


def _forced_recipe(problem: Problem, backend: str, name: str) -> Recipe:
    found = load(backend).supports(problem)
    step = "'s backward" if problem.step == "bwd" else ""
    if isinstance(found, str):
        raise ValueError(
            f"backend {backend!r} cannot run {problem.public_name}{step} here: {found}"
        )
    if not name:
        measured = (r for r in found if not passed_over(backend, r.name, problem))
        return next(measured, found[0])
    for recipe in found:
        if name == recipe.name:
            return recipe
    if problem.step == "bwd" and _is_of_the_forward(problem, backend, name):
        return _forced_recipe(problem, backend, "")
    known = ", ".join(repr(f"{backend}:{recipe.name}") for recipe in found)
    raise ValueError(
        f"backend must be {known} for {problem.public_name}{step} here, got '{backend}:{name}'"
    )


def _is_of_the_forward(problem: Problem, backend: str, name: str) -> bool:
    """A forward pins its backward, which need not have a recipe of that name."""
    forwards = (problem._replace(step="fwd", needs=(), bias=bias) for bias in (True, False))
    return any(recipe.name == name for p in forwards for recipe in recipes(backend, p))


def recipes(backend: str, problem: Problem) -> list[Recipe]:
    """How ``backend`` can run ``problem``, best first; none where it cannot."""
    found: list[Recipe] | str = load(backend).supports(problem)
    return [] if isinstance(found, str) else found


def by_rules(problem: Problem) -> tuple[Recipe, str]:
    """What runs ``problem`` where this machine has not been measured, and why."""
    refusals: list[str] = []
    for backend in BACKENDS:
        if blanket := passed_over(backend, "", problem):
            refusals.append(f"not {backend}: {blanket}")  # without importing it
            continue
        found = load(backend).supports(problem)
        if isinstance(found, str):
            refusals.append(f"not {backend}: {found}")
            continue
        for recipe in found:
            if why_not := passed_over(backend, recipe.name, problem):
                refusals.append(f"not {backend} ({recipe.name}): {why_not}")
            else:
                return recipe, "; ".join([recipe.reason, *refusals])
    raise AssertionError("the reference supports every problem")


def run(p: Operands, backend: str | None, choice: Choice | None = None) -> Any:
    """Run a step on the chosen backend; ``choice`` is that of the forward which a backward goes on
    from, with what it made in the weight's place."""
    # On the path of every call that goes to a backend: what is called here is counted (T7).
    problem = problem_of(p)
    if choice is None:
        forced = backend or _forced or os.environ.get("QRLORA_BACKEND") or None
        choice = _choose(problem, forced, torch.get_num_threads() if tuning.table else 0)
    name = PUBLIC_NAMES[problem.op, problem.gate], problem.step
    _last.pop(name, None)
    _last[name] = choice
    return getattr(load(choice.backend), f"{problem.op}_{problem.step}")(p, choice.recipe)


def perform(choice: Choice, step: str, p: Operands) -> Any:
    """Run ``step``, as "low_rank_fwd", as ``choice`` says."""
    return getattr(load(choice.backend), step)(p, choice.recipe)


def last_choice(op: str, step: str | None = None) -> Choice | None:
    """The choice made for the last call of ``op``, if there was one.

    Parameters
    ----------
    op : str
        A public function, as "qr_linear", or an operation: "low_rank", "kron" or "linear_add".
    step : "fwd" or "bwd", optional
        Without it the last call of either.
    """
    for (name, step_), choice in reversed(list(_last.items())):
        operation, _ = OPERATIONS.get(name, (name, ""))
        if op in (name, operation) and step in (None, step_):
            return choice
    return None


def report() -> dict[str, tuple[bool, str]]:
    """For each backend whether it is available on this machine, and why (not)."""
    return {name: load(name).available() for name in BACKENDS}
