"""Layers that answer as their base for a while, in one thread, see :func:`qrlora_kernels.disabled`.

A compiled graph is guarded by what it read when it was made, and no guard knows threads. So a layer
carries a number while any thread has it off, and the graph that is made then asks at run time which
of both answers its thread wants. The number is a tensor, since a graph takes tensors as they come:
it is made once for all layers of a kind and for every time that they are off.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, library

if TYPE_CHECKING:
    from .layer import AdapterLinear

_numbers = itertools.count(1)
_lock = threading.Lock()
_users: Counter[int] = Counter()  # by a layer's number: how often it is off, in all threads


@contextmanager
def off(layers: Iterable[AdapterLinear]) -> Iterator[None]:
    """Inside, in this thread, ``layers`` answer as their base."""
    with _lock:
        held = [(layer, _number(layer)) for layer in layers]
        numbers = Counter(int(number) for _, number in held)
        _users.update(numbers)
    _mine.numbers = _mine.numbers + numbers
    try:
        yield
    finally:
        _mine.numbers = _mine.numbers - numbers
        with _lock:
            _users.subtract(numbers)
            for layer, number in held:
                if _users[int(number)] == 0:
                    del _users[int(number)]
                    if vars(layer).get("_off") is number:  # not if it was taken off meanwhile
                        layer._off = None


def _number(layer: AdapterLinear) -> Tensor:
    if layer._off is None:
        layer._off = torch.tensor(next(_numbers))
    return layer._off


class _Mine(threading.local):
    """The numbers that this thread has off, and how often."""

    # PyTorch has a thread-local state of its own, which a backward takes along to its threads, but
    # what is stashed there is not kept alive in every release (2.11 ends the process).
    def __init__(self) -> None:  # of each thread
        self.numbers: Counter[int] = Counter()


_mine = _Mine()


def check_on(layers: Iterable[AdapterLinear], doing: str) -> None:
    """Raise if some thread has one of ``layers`` off, whose base would then no longer answer."""
    if any(layer._off is not None for layer in layers):
        raise ValueError(
            f"{doing} needs adapters that are on, got some that qk.disabled has off: leave it first"
        )


def is_off(number: Tensor) -> bool:
    """Whether this thread has the layer of ``number`` off."""
    return _mine.numbers[int(number)] > 0


def forward(layer: AdapterLinear, number: Tensor, x: Tensor) -> Tensor:
    """Of a layer that some thread has off."""
    if torch.compiler.is_compiling():
        base = layer.base_forward(x)
        y, _ = torch.ops.qrlora.base_or_adapted(base, layer._adapted(x), number)
        chosen: Tensor = y
        return chosen
    if is_off(number):
        return layer.base_forward(x)
    return layer._adapted(x)


@library.custom_op("qrlora::base_or_adapted", mutates_args=())
def _base_or_adapted(base: Tensor, adapted: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    chosen = is_off(number)
    return (base if chosen else adapted).clone(), torch.tensor(chosen, device=base.device)


@_base_or_adapted.register_fake
def _(base: Tensor, adapted: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(adapted), torch.empty((), dtype=torch.bool, device=base.device)


def _keep_choice(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
    (chosen,) = ctx.saved_tensors
    zero = torch.zeros_like(dy)
    return torch.where(chosen, dy, zero), torch.where(chosen, zero, dy), None


_base_or_adapted.register_autograd(_backward, setup_context=_keep_choice)
