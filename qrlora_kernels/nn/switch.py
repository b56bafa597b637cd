"""Layers that answer as their base for a while, in one thread, see :func:`qrlora_kernels.disabled`.

A compiled graph is guarded by what it read when it was made, and no guard knows threads. So a layer
carries a number while any thread has it off, which a graph can be guarded by, and the graph that is
made then asks at run time which of both answers its thread wants.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .layer import AdapterLinear

_numbers = itertools.count(1)
_lock = threading.Lock()
_off: dict[int, Counter[int]] = {}  # by a layer's number: how often each thread has it off


@contextmanager
def off(layers: Iterable[AdapterLinear]) -> Iterator[None]:
    """Inside, in this thread, ``layers`` answer as their base."""
    thread, layers = threading.get_ident(), list(layers)
    with _lock:
        for layer in layers:
            layer._off = layer._off or next(_numbers)
            _off.setdefault(layer._off, Counter())[thread] += 1
    numbers = [layer._off for layer in layers]
    try:
        yield
    finally:
        with _lock:
            for layer, number in zip(layers, numbers, strict=True):
                _off[number][thread] -= 1
                _off[number] += Counter()  # drops those at zero
                if not _off[number]:
                    del _off[number]
                    layer._off = 0


def is_off(number: int) -> bool:
    """Whether this thread has the layer of ``number`` off."""
    return _off.get(number, Counter())[threading.get_ident()] > 0


def forward(layer: AdapterLinear, x: Tensor) -> Tensor:
    """Of a layer that some thread has off."""
    if torch.compiler.is_compiling():
        base = F.linear(x, layer.matrix(), layer.bias)
        y, _ = torch.ops.qrlora.base_or_adapted(base, layer._adapted(x), layer._off)
        chosen: Tensor = y
        return chosen
    if is_off(layer._off):
        return F.linear(x, layer.matrix(), layer.bias)
    return layer._adapted(x)


@torch.library.custom_op("qrlora::base_or_adapted", mutates_args=())
def _base_or_adapted(base: Tensor, adapted: Tensor, number: int) -> tuple[Tensor, Tensor]:
    chosen = is_off(number)
    return (base if chosen else adapted).clone(), torch.tensor(chosen, device=base.device)


@_base_or_adapted.register_fake
def _(base: Tensor, adapted: Tensor, number: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(adapted), torch.empty((), dtype=torch.bool, device=base.device)


def _keep_choice(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
    (chosen,) = ctx.saved_tensors
    zero = torch.zeros_like(dy)
    return torch.where(chosen, dy, zero), torch.where(chosen, zero, dy), None


_base_or_adapted.register_autograd(_backward, setup_context=_keep_choice)
