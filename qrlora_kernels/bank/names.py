"""Names of adapters as they are given, checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

BASE = "__base__"  # the name of a row that has no adapter, as in PEFT


def check_new(name: object) -> None:
    """Raise where ``name`` cannot be that of an adapter."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    if name == BASE or not name:
        raise ValueError(f"name must not be empty or {BASE!r}, which is the base's, got {name!r}")


def once_each(names: Sequence[str]) -> list[str]:
    """Names of a file, no two of them alike."""
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise TypeError(f"names must be a list of names, got {names!r}")
    found = list(names)
    for at, name in enumerate(found):
        if not isinstance(name, str):
            raise TypeError(f"names must hold strings, got {name!r} at {at}")
    if len(set(found)) != len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise ValueError(f"names must hold each name once, got {twice!r} twice")
    return found


def of_rows(names: Sequence[str | None]) -> list[str]:
    """A name for each row of a batch."""
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
        raise TypeError(f"names must be a list with a name for each row, got {names!r}")
    found = [BASE if name is None else name for name in names]
    for at, name in enumerate(found):
        if not isinstance(name, str):
            raise TypeError(f"names must hold strings or None, got {name!r} for row {at}")
    if not found:
        raise ValueError("names must have a name for each row, got none")
    return found
