"""The table of what trains: a row for each adapter, by name, shared between threads."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .slots import Slot, Slots

WhenFull = Literal["refuse", "evict"]
BASE = "__base__"  # the name of a row that has no adapter, as in PEFT


class Table:
    """Rows of numbers [capacity + 1, P] by name; row 0 is the base's.

    Attributes
    ----------
    rows : Tensor [capacity + 1, P]
    unsaved : set of str
        Names whose numbers are in no file.
    lock : Lock
        Of all of it. Methods take it; who reads or writes ``rows`` itself takes it too.
    """

    def __init__(self, capacity: int, base: Tensor, when_full: WhenFull) -> None:
        self.rows = torch.zeros(capacity + 1, len(base), dtype=base.dtype, device=base.device)
        self.rows[0] = base
        self.when_full = when_full
        self.unsaved: set[str] = set()
        self.lock = threading.Lock()
        self._slots = Slots(capacity)

    # --- names

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    @property
    def capacity(self) -> int:
        return self._slots.capacity

    def names(self) -> list[str]:
        """The least recently used first."""
        with self.lock:
            return self._slots.names()

    def slot(self, name: str) -> Slot:
        """Where ``name`` is."""
        if name not in self._slots:
            raise ValueError(f"name must be of an adapter in the bank, got {name!r}")
        return self._slots[name]

    def holds(self, name: str, slot: Slot | None) -> bool:
        """Whether ``name`` is still the adapter that it was when it had ``slot``."""
        return slot is not None and name in self._slots and self._slots[name] == slot

    def check_new(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {type(name).__name__}")
        if name == BASE or not name:
            raise ValueError(f"name must not be empty or the base's, {BASE!r}, got {name!r}")
        if name in self._slots:
            raise ValueError(f"name must be new in the bank, got {name!r}: replace() or evict() it")

    # --- rows

    def copy(self, names: Sequence[str], use: bool = False) -> tuple[list[Slot | None], Tensor]:
        """Where ``names`` are, None for the base, and their numbers [A, P] as they are now.

        With ``use`` it counts as a use of each.
        """
        with self.lock:
            slots = [None if name == BASE else self.slot(name) for name in names]
            if use:
                self._slots.touch(name for name in names if name != BASE)
            at = torch.tensor([0 if slot is None else slot.row for slot in slots])
            return slots, self.rows.index_select(0, at.to(self.rows.device, torch.int64))

    def put(self, rows: Mapping[str, Tensor], unsaved: bool) -> None:
        """New names with their numbers, all or none."""
        with self.lock:
            for name in rows:
                self.check_new(name)
            self._make_room(len(rows))
            for name, row in rows.items():
                self.rows[self._slots.put(name).row] = row
            self.unsaved.update(rows if unsaved else ())

    def replace(self, name: str, row: Tensor) -> None:
        with self.lock:
            self.rows[self.slot(name).row] = row
            self.unsaved.add(name)

    def evict(self, name: str) -> None:
        with self.lock:
            self.slot(name)
            self._forget(name)

    def note_saved(self, names: Sequence[str], slots: list[Slot | None], rows: Tensor) -> None:
        """Those of ``names`` that still have what was written need not be written again."""
        with self.lock:
            for name, slot, row in zip(names, slots, rows, strict=True):
                if self.holds(name, slot) and torch.equal(self.rows[self.slot(name).row], row):
                    self.unsaved.discard(name)

    def _make_room(self, wanted: int) -> None:
        missing = len(self) + wanted - self.capacity
        if missing <= 0:
            return
        if self.when_full == "refuse" or wanted > self.capacity:
            raise ValueError(
                f"capacity must hold all adapters, got {len(self) + wanted} for {self.capacity}: "
                "evict some, or make the bank with when_full='evict'"
            )
        saved = self._slots.oldest(missing, but=self.unsaved)
        if len(saved) < missing:
            raise ValueError(
                f"{missing} adapters would have to go, and all but {len(saved)} have numbers that "
                "are not saved: save() or evict() some"
            )
        for name in saved:
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._slots.take(name)
        self.unsaved.discard(name)
