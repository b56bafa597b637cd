"""Batches whose rows have trainables of their own, in one thread, over shared frozen factors.

A layer does not know what its rows want: inside :func:`asking` it asks the source that this thread,
or this task of an event loop, has there, whatever others do meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ..adapters import Adapter, AnyAdapter, State

MERGED = "layers must not be merged where rows have their own adapters: unmerge first"
LEFT = (
    "the backward pass must run where the forward did, inside `use`, if activations are "
    "checkpointed: outside, the model would be computed again with its own adapter"
)
NESTED = "x must not be nested where rows have their own adapters: pad it"


class Rows(NamedTuple):
    """Of one module: the trainables [A, ...] of A adapters, and which of them each row has [B]."""

    own: State
    place: Tensor


class Source(Protocol):
    """Whoever knows what the rows of a batch have of their own."""

    def has(self, module: nn.Module) -> bool:
        """Whether it knows of ``module``, which else answers as it does alone."""

    def rows_of(self, module: nn.Module, x: Tensor) -> Rows:
        """What the rows of ``x`` [B, ..., K] have.

        Raises
        ------
        ValueError
            If ``x`` has another number of rows than the batch.
        """


class ByRow:
    """A layer that can answer for rows of different adapters over its factors."""

    adapter: ClassVar[AnyAdapter]
    _asked: bool  # in a context of any thread

    def trained_now(self) -> State:
        """The parameters that train."""
        raise NotImplementedError

    def begin(self) -> State:
        """What trains at the start, drawn anew where the start is random."""
        raise NotImplementedError

    def silent(self) -> State:
        """What trains where the update is zero."""
        raise NotImplementedError

    def frozen_now(self) -> State:
        """The frozen factors."""
        raise NotImplementedError

    def began_from(self) -> tuple[Tensor, State, float]:
        """The base's weight as it is stored, or the dense one that a quantised stands for, the
        frozen factors, and the update's scaling."""
        raise NotImplementedError

    def check_by_row(self, name: str) -> None:
        """Raise where rows cannot have adapters of their own; ``name`` is the layer's."""
        raise NotImplementedError


class _Asked:
    """A source and whether its time has not ended, in whatever order contexts are left."""

    def __init__(self, source: Source) -> None:
        self.source, self.open = source, True


# Those of this thread, or of this task of an event loop, the innermost first.
_mine: ContextVar[tuple[_Asked, ...]] = ContextVar("qrlora_kernels.per_row", default=())
_lock = threading.Lock()
_askers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # contexts of all threads
# Those last asked by whoever trains, but with no gradient recorded, as a checkpoint asks that comes
# again in the backward pass.
_unfinished: WeakSet[nn.Module] = WeakSet()


@contextmanager
def asking(modules: Iterable[nn.Module], source: Source) -> Iterator[None]:
    """Inside, in this thread or task, ``modules`` ask ``source`` what each row of a batch has."""
    modules, asked = list(modules), _Asked(source)
    _count(modules, 1)
    _mine.set((asked, *_mine.get()))
    try:
        yield
    finally:
        asked.open = False
        _mine.set(tuple(one for one in _mine.get() if one.open))
        _count(modules, -1)


def asks(modules: Iterable[nn.Module]) -> bool:
    """Whether this thread or task is inside :func:`asking` of one of ``modules``."""
    mine = _sources()
    return any(source.has(module) for module in modules for source in mine)


def refuse(module: nn.Module, why: str) -> None:
    """Raise where rows have adapters of their own, of which ``module`` would know nothing."""
    if asks([module]):
        raise ValueError(why)


def _sources() -> list[Source]:
    mine = _mine.get()
    if not mine and _in_thread_of_autograd():
        raise ValueError(
            "activations must not be checkpointed while rows have adapters of their own, where "
            "autograd computes them again in a thread of its own, as on a GPU: that thread cannot "
            "know whose the rows are"
        )
    return [asked.source for asked in mine if asked.open]


def _in_thread_of_autograd() -> bool:
    """Of threads that PyTorch made, Python knows nothing but that they are there."""
    running = torch._C._current_graph_task_id() != -1
    return running and isinstance(threading.current_thread(), threading._DummyThread)


def _count(modules: list[nn.Module], by: int) -> None:
    """The counts are not the modules': compiled code would depend on each of their values."""
    with _lock:
        for module in modules:
            _askers[module] = _askers.get(module, 0) + by
            if "_asked" in vars(module):  # not if it was taken off meanwhile
                vars(module)["_asked"] = _askers[module] > 0 or module in _unfinished


def rows_of(module: nn.Module, x: Tensor) -> Rows | None:
    """What the rows of ``x`` have of their own in ``module``, as this thread asks."""
    for source in _sources():
        if source.has(module):
            if x.is_nested:
                raise ValueError(NESTED)
            rows = source.rows_of(module, x)
            _note(module, unfinished=_trains(rows) and not torch.is_grad_enabled())
            return rows
    if module in _unfinished:
        if torch._C._current_graph_task_id() != -1:
            raise ValueError(LEFT)
        _note(module, unfinished=False)  # it has answered alone since
    return None


def _trains(rows: Rows) -> bool:
    return any(tensor.requires_grad for tensor in rows.own.values())


def _note(module: nn.Module, unfinished: bool) -> None:
    """Keep ``module`` asking after its context where a checkpoint may come back to it."""
    if unfinished == (module in _unfinished):
        return
    with _lock:
        (_unfinished.add if unfinished else _unfinished.discard)(module)
        if "_asked" in vars(module):
            vars(module)["_asked"] = unfinished or _askers.get(module, 0) > 0


# What torch.compiler.disable sets, which would import the compiler: no graph knows threads.
vars(rows_of)["_torchdynamo_disable"] = vars(refuse)["_torchdynamo_disable"] = True


# --- plain linear layers


def listen(head: nn.Linear) -> None:
    """Let a plain linear layer ask as well; once is enough, and it stays.

    Before other hooks of the layer, which see the answer of the rows.
    """
    if "_asked" not in vars(head):
        vars(head)["_asked"] = False
        before = list(head._forward_hooks.items())
        head._forward_hooks.clear()
        head.register_forward_hook(_answer, with_kwargs=True)
        # Not by prepend=True, which moves the hook within the dict: torch.compile of PyTorch 2.11
        # then takes one hook for another.
        head._forward_hooks.update(before)


def _answer(head: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
    if not vars(head).get("_asked"):
        return y
    x = args[0] if args else kwargs["input"]
    rows = rows_of(head, x)
    return y if rows is None else linear_by_row(x, rows).to(y.dtype)


def linear_by_row(x: Tensor, rows: Rows) -> Tensor:
    """x [B, ..., K] by the weight [N, K] and the bias of each row."""
    weight = rows.own["weight"][rows.place]
    y = Adapter.flat_rows(x).to(weight.dtype) @ weight.mT
    if "bias" in rows.own:
        y = y + rows.own["bias"][rows.place].unsqueeze(1)
    return y.reshape(*x.shape[:-1], y.shape[-1])
