"""How a factorisation is called: over one matrix or several, whatever the caller has set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

import torch
from torch import Tensor

from .checks import Named, Weights, named_matrices

P = ParamSpec("P")
R = TypeVar("R")


class Factorisation(Protocol[P, R]):
    """A result for a matrix, a list of them for a sequence or for a mapping from names."""

    __name__: str

    @overload
    def __call__(self, weights: Tensor, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def __call__(self, weights: Weights, *args: P.args, **kwargs: P.kwargs) -> list[R]: ...


def factorisation(
    function: Callable[Concatenate[Named, P], list[R]],
) -> Factorisation[P, R]:
    """``function`` of checked matrices by name, as a factorisation of a tensor or of several."""
    computed = start_computation(function)

    @functools.wraps(function)
    def run(weights: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
        results = computed(named_matrices(weights), *args, **kwargs)
        return results[0] if isinstance(weights, Tensor) else results

    return run


def start_computation(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` without gradients and without autocast, which would round fp32 products.

    What it makes without naming a device is on the CPU, whatever the caller's default device is.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with (
            torch.no_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            return function(*args, **kwargs)

    return run
