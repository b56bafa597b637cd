"""Which row of a table belongs to which name, the least recently used one first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable
from itertools import islice
from typing import NamedTuple


class Slot(NamedTuple):
    """A row of the table, and the times at which a name came to it and its numbers were put there.

    What was computed for an adapter that is gone never reaches the one that came after it, nor what
    was computed for numbers that were replaced.
    """

    row: int
    came: int
    given: int


class Slots:
    """Names and their rows, 1 to ``capacity``; row 0 is nobody's."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._of: OrderedDict[str, Slot] = OrderedDict()
        self._free: list[int] = []
        self._next, self._time = 1, 0

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, name: object) -> bool:
        return name in self._of

    def __getitem__(self, name: str) -> Slot:
        return self._of[name]

    def names(self) -> list[str]:
        """The least recently used first."""
        return list(self._of)

    def put(self, name: str) -> Slot:
        """A row for a new ``name``, where there is one left."""
        row = self._free.pop() if self._free else self._next
        self._next += row == self._next
        self._time += 1
        slot = self._of[name] = Slot(row, self._time, self._time)
        return slot

    def renew(self, name: str) -> Slot:
        """The row of ``name`` for other numbers."""
        self._time += 1
        slot = self._of[name] = self._of[name]._replace(given=self._time)
        return slot

    def take(self, name: str) -> Slot:
        """Forget ``name``."""
        slot = self._of.pop(name)
        self._free.append(slot.row)
        return slot

    def touch(self, names: Iterable[str]) -> None:
        """Note that ``names`` are being used."""
        for name in names:
            self._of.move_to_end(name)

    def oldest(self, count: int, but: Container[str]) -> list[str]:
        """Up to ``count`` names whose last use was longest ago."""
        return list(islice((name for name in self._of if name not in but), count))
