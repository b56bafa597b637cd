"""What was measured on this machine: it decides before the general rules of ``measured`` do.

``qrlora_kernels.tune`` fills the table and may write it to a file, which the environment variable
``QRLORA_TUNING`` brings back in another process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..chip import chip_name
from ..files import write_text
from ..version import __version__
from .problem import Problem

FORMAT = 1
_OCTAVES = 1.0  # how far, in factors of two, the number of tokens may be from a measured one


class Entry(NamedTuple):
    """One measured problem: the chip, the problem's numbers, and who was fastest, and by how much.

    ``over`` is the winner's time over that of ``rival``, the next best (1 and "" if it was alone).
    """

    chip: str
    op: str
    dtype: str
    m: int
    n: int
    k: int
    r: int
    winner: str
    rival: str
    over: float

    def reason(self) -> str:
        text = f"measured on this {self.chip} with {self.m} tokens"
        return f"{text}: {self.over:.2f} of {self.rival}'s time" if self.rival else text


Key = tuple[str, str, str, int, int, int]
_table: dict[Key, dict[int, Entry]] = {}
_read: list[str] = []  # files already looked at because the environment named them


def entry_for(problem: Problem, winner: str, rival: str = "", over: float = 1.0) -> Entry:
    """What was found for ``problem``."""
    chip, op, dtype, n, k, r = _key(problem)
    return Entry(chip, op, dtype, problem.m, n, k, r, winner, rival, over)


def add(entries: Iterable[Entry], replace: bool = True) -> None:
    """Let these decide from now on; ``replace`` what is known of the same problems."""
    for e in entries:
        known = _table.setdefault((e.chip, e.op, e.dtype, e.n, e.k, e.r), {})
        if replace or e.m not in known:
            known[e.m] = e


def clear() -> None:
    _table.clear()
    _read.clear()


def entries() -> list[Entry]:
    return [e for found in _table.values() for e in found.values()]


def lookup(problem: Problem) -> Entry | None:
    """The entry of this shape whose number of tokens is nearest, at most a factor of two away."""
    read_named_file()
    found = _table.get(_key(problem)) if _table else None
    if not found or problem.m < 1:
        return None

    def distance(m: int) -> float:
        return abs(math.log2(m / problem.m))

    nearest = min(found, key=distance)
    return found[nearest] if distance(nearest) <= _OCTAVES else None


# --- files --------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str]) -> None:
    """The whole table as JSON, under another name first."""
    content = {
        "format": FORMAT,
        "qrlora_kernels": __version__,
        "torch": str(torch.__version__),
        "entries": [e._asdict() for e in entries()],
    }
    write_text(Path(path), json.dumps(content, indent=1) + "\n")


def read_named_file() -> None:
    """:func:`read` the file that ``QRLORA_TUNING`` names, once."""
    path = os.environ.get("QRLORA_TUNING")
    if path and path not in _read:
        read(path, "QRLORA_TUNING")
        _read.append(path)


def read(path: str | os.PathLike[str], name: str = "path") -> None:
    """Let a file's entries decide where nothing was measured since.

    Raises
    ------
    ValueError
        If it is not there, or holds something else than :func:`write` writes.
    """
    try:
        found = _entries_of(Path(path).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name} must name a table that tune() wrote (format {FORMAT}), "
            f"got {os.fspath(path)!r}: {type(error).__name__}: {error}"
        ) from error
    add(found, replace=False)


def _entries_of(data: bytes) -> list[Entry]:
    content = json.loads(data.decode("utf-8"))
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r}")
    return [_entry(fields) for fields in content["entries"]]


def _entry(fields: dict[str, Any]) -> Entry:
    entry = Entry(**fields)
    kinds: tuple[Any, ...] = (str,) * 3 + (int,) * 4 + (str, str, (int, float))
    for name, value, kind in zip(Entry._fields, entry, kinds, strict=True):
        if not isinstance(value, kind) or (kind is int and value < 1):
            raise ValueError(f"{name} is {value!r}")
    return entry


def here(device: torch.device) -> str:
    """What measurements are filed under: the chip, and of a CPU the threads in use."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return chip_name(device) + threads


def _key(problem: Problem) -> Key:
    dtype = str(problem.dtype).removeprefix("torch.")
    return here(problem.device), problem.op, dtype, problem.n, problem.k, problem.r
