"""Many adapters over one adapted model: served and trained by the rows of a batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..adapters import State
from ..adapters.options import plain_value
from ..linalg.checks import check_choice
from ..model.names import as_names, check_model
from ..nn.per_row import asking
from . import files, packed
from .batch import Batch
from .layout import Layout
from .names import BASE, check_new, of_rows, once_each
from .optimizer import BankAdamW, Found
from .slots import Slot, Slots

WhenFull = Literal["refuse", "evict"]


class AdapterBank:
    """A table of what trains, one row an adapter, over one adapted model.

    The frozen factors belong to the base and are there once; an adapter is what trains: r numbers a
    layer of QR-LoRA, r² of LoRA-XS, and its heads. A call costs what the distinct adapters of its
    batch cost, however many are in the table. All of them begin from the model's factors; the
    model's own adapter stays beside the table and answers outside :meth:`use`.

    Calls from several threads may serve while others add, replace and evict.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity: int,
        heads: str | Iterable[str] | None = None,
        when_full: WhenFull = "refuse",
    ) -> None:
        """
        Parameters
        ----------
        model : nn.Module
            With layers adapted by :func:`adapt` or, under PEFT, with one active adapter of ours.
        capacity : int
            How many adapters the table has room for. Memory is taken as they come, where the system
            gives it so.
        heads : str or iterable of str, optional
            Linear layers, or modules that hold some, of which every adapter has its own; by default
            those that train. Nothing else may train beside the adapters.
        when_full : "refuse" or "evict"
            What :meth:`add` does where there is no room: raise, or evict the adapter whose last use
            was longest ago, of those that are saved: what was trained, added or replaced with a
            state since is not lost.

        Raises
        ------
        TypeError, ValueError
            If the model has no adapted layer, one is merged, something else than a linear layer
            trains beside them, or an argument is out of range.
        """
        check_model(model)
        capacity = plain_value("capacity", "int", capacity)
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        check_choice("when_full", when_full, get_args(WhenFull))
        self.model = model
        self.when_full = when_full
        self.layout = Layout(model, None if heads is None else as_names("heads", heads))
        first = self.layout.silent()
        with torch.inference_mode(False):  # it may be changed elsewhere
            self._table = torch.zeros(
                capacity + 1, self.layout.width, dtype=first.dtype, device=first.device
            )
            self._table[0] = first
        self._slots = Slots(capacity)
        self._unsaved: set[str] = set()
        self._optimizers: WeakSet[BankAdamW] = WeakSet()
        # Of the table and of the names; a rate that is called in a step may ask the bank again.
        self._lock = threading.RLock()
        tuner = getattr(model, "base_model", None)
        if tuner is not None and hasattr(tuner, "serve_by"):  # one of ours under PEFT
            tuner.serve_by(self)

    # --- what is here

    @property
    def capacity(self) -> int:
        return self._slots.capacity

    @property
    def numbers(self) -> int:
        """How many numbers one adapter has."""
        return self.layout.width

    @property
    def nbytes(self) -> int:
        """The bytes of what the adapters that are here have."""
        return len(self) * self.numbers * self._table.element_size()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def names(self) -> list[str]:
        """The adapters that are here, the least recently used first."""
        with self._lock:
            return self._slots.names()

    def state(self, name: str) -> State:
        """A copy of what trains in ``name``, by full names, as :meth:`add` takes it."""
        _, rows = self._rows_of([name])
        return self.layout.state(rows[0])

    # --- in and out

    def add(self, name: str, state: Mapping[str, Tensor] | None = None) -> None:
        """Put an adapter into the table.

        Parameters
        ----------
        name : str
            A new one.
        state : dict of Tensor, optional
            What trains by full names ("encoder.query.lam"), heads among them; by default the start:
            that of the layers, and the heads as the model has them now.

        Raises
        ------
        TypeError, ValueError
            If the name is taken, there is no room, or the state is not one of this model.
        """
        check_new(name)
        row = self.layout.begin() if state is None else self.layout.row(state)
        self._put({name: row}, saved=state is None)

    def replace(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Give ``name`` other numbers; a batch under way finishes with those that it began with."""
        row = self.layout.row(state)
        with self._lock:
            self._table[self._slot_of(name).row] = row
            self._unsaved.add(name)

    def evict(self, name: str) -> None:
        """Take ``name`` out of the table; a batch under way finishes with its numbers."""
        with self._lock:
            self._slot_of(name)
            self._forget(name)

    def load(
        self,
        paths: str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any],
        progress: bool = False,
    ) -> list[str]:
        """Add what files hold; everything is read and checked before the table changes.

        Parameters
        ----------
        paths : path, iterable of paths, or dict of paths by name
            Files of :func:`save_adapter` or :meth:`save`, named by their stems where no name is
            given, or of :meth:`pack`, which know the names. They must begin from the bank's
            factors, or from the first of them: a smaller rank is filled up with zeros.
        progress : bool
            Show a bar over the files.

        Returns
        -------
        list of str
            The names that were added.

        Raises
        ------
        FileNotFoundError
            If a file is not there.
        ValueError
            If a file is damaged or of another start, a name is taken, or there is no room.
        """
        found = files.read_all(self.layout, paths, plain_value("progress", "bool", progress))
        self._put(found, saved=True)
        return list(found)

    def save(self, name: str, path: str | os.PathLike[str]) -> None:
        """Write ``name`` as the file that :func:`save_adapter` writes of a model that has it.

        It loads into a bank again, or into a plain model by :func:`load_adapter`. The bank must be
        over a model that :func:`adapt` made.
        """
        at, row = self._rows_of([name])
        files.save(self.model, self.layout, row[0], path)
        self._note_saved([name], at, row)

    def pack(self, path: str | os.PathLike[str], names: Sequence[str] | None = None) -> None:
        """Write many adapters (``names``, or all) to one file that :meth:`load` reads in bulk.

        Parameters
        ----------
        path : str or path
        names : sequence of str, optional
        """
        wanted = self.names() if names is None else once_each(names)
        slots, rows = self._rows_of(wanted)
        packed.write(self.layout, wanted, rows, path)
        self._note_saved(wanted, slots, rows)

    # --- batches

    @contextmanager
    def use(self, names: Sequence[str | None], rank: int | None = None) -> Iterator[Batch]:
        """Inside, row b of what goes through the model has the adapter names[b].

        That is in this thread, or in this task of an event loop.

        The numbers are those of the time of entry. Where gradients are recorded, what backward
        finds is there for :meth:`adamw`; the backward must be inside too if the model checkpoints
        its activations.

        Parameters
        ----------
        names : sequence of str or None
            As many as the batch has rows (its first dimension); None, or "__base__": the base.
        rank : int, optional
            Only the first directions of every layer count, as if the adapters had this rank
            (QR-LoRA and LoRA-XS, whose directions come in the order of their weight).

        Yields
        ------
        Batch

        Raises
        ------
        TypeError, ValueError
            If a name is not here, a layer is merged or has other factors than when the bank was
            made, or the model is given another number of rows.
        """
        self.layout.check()
        wanted = of_rows(names)
        distinct = list(dict.fromkeys(wanted))
        with self._lock:
            own = [name for name in distinct if name != BASE]
            if unknown := self._slots.unknown(own):
                raise ValueError(f"names must be of adapters in the bank, got {unknown[0]!r}")
            self._slots.touch(own)
            slots = [None if name == BASE else self._slots[name] for name in distinct]
            at = torch.tensor([0 if slot is None else slot.row for slot in slots])
            rows = self._table.index_select(0, at.to(self._table.device))
        batch = Batch(self.layout, wanted, distinct, slots, rows, rank)
        if batch.numbers.requires_grad:
            batch.numbers.register_post_accumulate_grad_hook(self._noting(distinct, slots))
        with asking(self.layout.modules, batch):
            yield batch

    def adamw(self, lr: Any = 1e-2, **options: Any) -> BankAdamW:
        """An AdamW of each adapter; see :class:`BankAdamW` for the options."""
        return BankAdamW(self, lr, **options)

    def _noting(self, names: list[str], slots: list[Slot | None]) -> Callable[[Tensor], None]:
        """A hook that tells the optimizers of numbers that have a gradient.

        It must not hold them: a tensor whose hook holds it is never freed.
        """

        def note(numbers: Tensor) -> None:
            with self._lock:
                for optimizer in self._optimizers:
                    optimizer._note(Found(numbers, names, slots))

        return note

    # --- names and rows

    def _slot_of(self, name: str) -> Slot:
        if not isinstance(name, str) or name not in self._slots:
            raise ValueError(f"name must be of an adapter in the bank, got {name!r}")
        return self._slots[name]

    def _rows_of(self, names: Sequence[str]) -> tuple[list[Slot], Tensor]:
        """Where ``names`` are, and a copy of their numbers [A, P]."""
        with self._lock:
            slots = [self._slot_of(name) for name in names]
            at = torch.tensor([slot.row for slot in slots], dtype=torch.int64)
            return slots, self._table.index_select(0, at.to(self._table.device))

    def _note_saved(self, names: Sequence[str], slots: list[Slot], rows: Tensor) -> None:
        """Those of ``names`` that are still what was written need not be written again."""
        with self._lock:
            at = torch.tensor([slot.row for slot in slots], dtype=torch.int64)
            now = self._table.index_select(0, at.to(self._table.device))
            for name, slot, same in zip(names, slots, (now == rows).all(1).tolist(), strict=True):
                if same and self._slots.get(name) == slot:
                    self._unsaved.discard(name)

    def _check_new(self, name: str) -> None:
        check_new(name)
        if name in self._slots:
            raise ValueError(f"name must be new in the bank, got {name!r}: replace() or evict() it")

    def _put(self, rows: Mapping[str, Tensor], saved: bool) -> None:
        """All of ``rows`` or none."""
        with self._lock:
            for name in rows:  # no other thread has added one meanwhile
                self._check_new(name)
            self._make_room(len(rows))
            for name, row in rows.items():
                self._table[self._slots.put(name).row] = row
            if not saved:
                self._unsaved.update(rows)

    def _make_room(self, wanted: int) -> None:
        missing = len(self._slots) + wanted - self.capacity
        if missing <= 0:
            return
        if self.when_full == "refuse" or wanted > self.capacity:
            raise ValueError(
                f"capacity must hold all adapters, got {len(self._slots) + wanted} for "
                f"{self.capacity}: evict some, or make the bank with when_full='evict'"
            )
        # No walk over all that are here.
        saved = list(islice((n for n in self._slots if n not in self._unsaved), missing))
        if len(saved) < missing:
            raise ValueError(
                f"{missing} adapters would have to go, and all but {len(saved)} have numbers that "
                "are not saved: save() or evict() some"
            )
        for name in saved:
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._slots.take(name)
        self._unsaved.discard(name)
        for optimizer in self._optimizers:
            optimizer._forget(name)
