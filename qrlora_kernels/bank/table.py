"""The table of what trains: a row for each adapter, by name, shared between threads."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .names import BASE, check_new
from .slots import Slot, Slots

WhenFull = Literal["refuse", "evict"]


class Table:
    """Rows of numbers [capacity + 1, P] by name; row 0 is the base's.

    Attributes
    ----------
    rows : Tensor [capacity + 1, P]
    unsaved : set of str
        Names whose numbers are in no file.
    lock : RLock
        Of all of it. Methods take it; who reads or writes ``rows`` itself takes it too.
    """

    def __init__(self, capacity: int, base: Tensor, when_full: WhenFull) -> None:
        with torch.inference_mode(False):  # it may be changed elsewhere
            self.rows = torch.zeros(capacity + 1, len(base), dtype=base.dtype, device=base.device)
            self.rows[0] = base
        self.when_full = when_full
        self.unsaved: set[str] = set()
        self.lock = threading.RLock()  # a rate that is called in a step may ask the bank again
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
        if not isinstance(name, str) or name not in self._slots:
            raise ValueError(f"name must be of an adapter in the bank, got {name!r}")
        return self._slots[name]

    def holds(self, name: str, slot: Slot | None) -> bool:
        """Whether ``name`` is still the adapter that it was when it had ``slot``."""
        return slot is not None and name in self._slots and self._slots[name] == slot

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
                check_new(name)
                if name in self._slots:
                    raise ValueError(
                        f"name must be new in the bank, got {name!r}: replace() or evict() it"
                    )
            self._make_room(len(rows))
            for name, row in rows.items():
                self.rows[self._slots.put(name).row] = row
            self.unsaved.update(rows if unsaved else ())

    def replace(self, name: str, row: Tensor) -> None:
        with self.lock:
            self.slot(name)
            self.rows[self._slots.renew(name).row] = row
            self.unsaved.add(name)

    def evict(self, name: str) -> None:
        with self.lock:
            self.slot(name)
            self._forget(name)

    def note_saved(self, names: Sequence[str], slots: list[Slot | None], rows: Tensor) -> None:
        """Those of ``names`` that still have what was written need not be written again."""
        with self.lock:
            at = torch.tensor([0 if slot is None else slot.row for slot in slots])
            now = self.rows.index_select(0, at.to(self.rows.device, torch.int64))
            for name, slot, same in zip(names, slots, (now == rows).all(1).tolist(), strict=True):
                if same and self.holds(name, slot):
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
