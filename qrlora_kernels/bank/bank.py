"""Many adapters over one adapted model: served and trained by the rows of a batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args
from weakref import WeakSet

from torch import Tensor, nn

from ..adapters import State
from ..adapters.options import plain_value
from ..linalg.checks import check_choice
from ..model.names import as_names, check_model
from ..nn.per_row import asking
from . import files, packed
from .batch import Batch
from .layout import Layout
from .names import check_new, of_rows, once_each
from .optimizer import BankAdamW, Found
from .slots import Slot
from .table import Table, WhenFull


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
        self.layout = Layout(model, None if heads is None else as_names("heads", heads))
        self.table = Table(capacity, self.layout.silent(), when_full)
        self._optimizers: WeakSet[BankAdamW] = WeakSet()
        tuner = getattr(model, "base_model", None)
        if tuner is not None and hasattr(tuner, "serve_by"):  # one of ours under PEFT
            tuner.serve_by(self)

    # --- what is here

    @property
    def capacity(self) -> int:
        return self.table.capacity

    @property
    def numbers(self) -> int:
        """How many numbers one adapter has."""
        return self.layout.width

    @property
    def nbytes(self) -> int:
        """The bytes of what the adapters that are here have."""
        return len(self) * self.numbers * self.table.rows.element_size()

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, name: object) -> bool:
        return name in self.table

    def names(self) -> list[str]:
        """The adapters that are here, the least recently used first."""
        return self.table.names()

    def state(self, name: str) -> State:
        """A copy of what trains in ``name``, by full names, as :meth:`add` takes it."""
        _, rows = self.table.copy([name])
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
        self.table.put({name: row}, unsaved=state is not None)

    def replace(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Give ``name`` other numbers; a batch under way finishes with those that it began with.

        Moments and step counts of optimizers begin again, its rate stays.
        """
        self.table.replace(name, self.layout.row(state))

    def evict(self, name: str) -> None:
        """Take ``name`` out of the table; a batch under way finishes with its numbers."""
        self.table.evict(name)

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
        self.table.put(found, unsaved=False)
        return list(found)

    def save(self, name: str, path: str | os.PathLike[str]) -> None:
        """Write ``name`` as the file that :func:`save_adapter` writes of a model that has it.

        It loads into a bank again, or into a plain model by :func:`load_adapter`. The bank must be
        over a model that :func:`adapt` made.
        """
        slots, rows = self.table.copy([name])
        files.save(self.model, self.layout, rows[0], path)
        self.table.note_saved([name], slots, rows)

    def pack(self, path: str | os.PathLike[str], names: Sequence[str] | None = None) -> None:
        """Write many adapters (``names``, or all) to one file that :meth:`load` reads in bulk.

        Parameters
        ----------
        path : str or path
        names : sequence of str, optional
        """
        wanted = self.names() if names is None else once_each(names)
        slots, rows = self.table.copy(wanted)
        packed.write(self.layout, wanted, rows, path)
        self.table.note_saved(wanted, slots, rows)

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
        slots, rows = self.table.copy(distinct, use=True)
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
            with self.table.lock:
                for optimizer in self._optimizers:
                    optimizer._note(Found(numbers, names, slots))

        return note
