"""Batches whose rows have trainables of their own, in one thread, over shared frozen factors.

A layer does not know what its rows want: inside :func:`asking` it asks the source that this thread
has there, whatever other threads do meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from ..adapters import Adapter, AnyAdapter, State


class Rows(NamedTuple):
    """Of one module: the trainables [A, ...] of A adapters, and which of them each row has [B]."""

    own: State
    place: Tensor


class Source(Protocol):
    """Whoever knows what the rows of a batch have of their own."""

    def rows_of(self, module: nn.Module, x: Tensor) -> Rows | None:
        """What the rows of ``x`` [B, ..., K] have; None: ``module`` answers as it does alone.

        Raises
        ------
        ValueError
            If ``x`` has another number of rows than the batch.
        """


class ByRow:
    """A layer that can answer for rows of different adapters over its factors."""

    adapter: ClassVar[AnyAdapter]
    _asked: int  # in how many contexts of all threads

    def trained_now(self) -> State:
        """The parameters that train."""
        raise NotImplementedError

    def begin(self) -> State:
        """What trains at the start, drawn anew where the start is random."""
        raise NotImplementedError

    def silent(self) -> State:
        """What trains where the update is zero."""
        raise NotImplementedError

    def began_from(self) -> tuple[Tensor, State, float]:
        """The base's weight as it is stored, the frozen factors, and the update's scaling."""
        raise NotImplementedError

    def check_by_row(self, name: str) -> None:
        """Raise where rows cannot have adapters of their own; ``name`` is the layer's."""
        raise NotImplementedError


class _Mine(threading.local):
    """The sources of this thread, the innermost first."""

    def __init__(self) -> None:  # of each thread
        self.sources: tuple[Source, ...] = ()


_mine = _Mine()
_lock = threading.Lock()


@contextmanager
def asking(modules: Iterable[nn.Module], source: Source) -> Iterator[None]:
    """Inside, in this thread, ``modules`` ask ``source`` what each row of a batch has."""
    held = [vars(module) for module in modules]
    _count(held, 1)
    before, _mine.sources = _mine.sources, (source, *_mine.sources)
    try:
        yield
    finally:
        _mine.sources = before
        _count(held, -1)


def _count(held: list[dict[str, Any]], by: int) -> None:
    with _lock:
        for attributes in held:
            if "_asked" in attributes:  # not if it was taken off meanwhile
                attributes["_asked"] += by


def rows_of(module: nn.Module, x: Tensor) -> Rows | None:
    """What the rows of ``x`` have of their own in ``module``, as this thread asks."""
    for source in _mine.sources:
        rows = source.rows_of(module, x)
        if rows is not None:
            return rows
    return None


# What torch.compiler.disable sets, which would import the compiler: no graph knows threads.
rows_of._torchdynamo_disable = True  # type: ignore[attr-defined]


# --- plain linear layers


def listen(head: nn.Linear) -> None:
    """Let a plain linear layer ask as well; once is enough, and it stays."""
    if "_asked" not in vars(head):
        vars(head)["_asked"] = 0
        head.register_forward_hook(_answer)


def _answer(head: nn.Linear, args: tuple[Any, ...], y: Tensor) -> Tensor:
    rows = rows_of(head, args[0]) if vars(head).get("_asked") else None
    return y if rows is None else linear_by_row(args[0], rows).to(y.dtype)


def linear_by_row(x: Tensor, rows: Rows) -> Tensor:
    """x [B, ..., K] by the weight [N, K] and the bias of each row."""
    weight = rows.own["weight"][rows.place]
    y = Adapter.flat_rows(x).to(weight.dtype) @ weight.mT
    if "bias" in rows.own:
        y = y + rows.own["bias"][rows.place].unsqueeze(1)
    return y.reshape(*x.shape[:-1], y.shape[-1])
