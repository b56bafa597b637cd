"""Which row of a table belongs to which name, the least recently used one first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Slot(NamedTuple):
    """A row of the table, and the time at which it was given to a name.

    What was computed for an adapter that is gone never reaches the one that came after it.
    """

    row: int
    given: int


class Slots:
    """Names and their rows, 1 to ``capacity``; row 0 is nobody's."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._of: OrderedDict[str, Slot] = OrderedDict()
        self._free: list[int] = []
        self._next, self._given = 1, 0

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, name: object) -> bool:
        return name in self._of

    def __getitem__(self, name: str) -> Slot:
        return self._of[name]

    def __iter__(self) -> Iterator[str]:
        """The least recently used first."""
        return iter(self._of)

    def get(self, name: str) -> Slot | None:
        return self._of.get(name)

    def names(self) -> list[str]:
        """The least recently used first."""
        return list(self._of)

    @property
    def full(self) -> bool:
        return len(self._of) == self.capacity

    def put(self, name: str) -> Slot:
        """A row for a new ``name``, where there is one left."""
        row = self._free.pop() if self._free else self._next
        self._next += row == self._next
        self._given += 1
        slot = self._of[name] = Slot(row, self._given)
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

    def unknown(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in self._of]
