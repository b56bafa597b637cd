"""What was measured on this machine: it decides before the general ``rules`` do.

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

from ..files import write_text
from ..version import __version__
from .chip import chip_name
from .problem import OPERATIONS, Problem, joined

FORMAT = 2  # 1 is read too
_OCTAVES = 1.0  # how far, in factors of two, the number of tokens may be from a measured one


class Entry(NamedTuple):
    """One measured step: the chip, the problem, and who was fastest how, and by how much.

    ``over`` is the winner's time over that of ``rival``, the next best (1 and "" if it was alone),
    which is "backend:recipe". Of a file of format 1 ``step``, ``layout`` and ``recipe`` are empty:
    it holds for both steps and every layout, and does not say how the winner does it.
    """

    chip: str
    op: str
    step: str
    gate: str
    form: str
    layout: str
    dtype: str
    m: int
    n: int
    k: int
    r: int
    winner: str
    recipe: str
    rival: str
    over: float

    def reason(self) -> str:
        both = "" if self.step else ", forward and backward together"
        text = f"measured on this {self.chip} with {self.m} tokens{both}"
        return f"{text}: {self.over:.2f} of {self.rival}'s time" if self.rival else text

    @property
    def key(self) -> Key:
        """What a problem of any number of tokens is looked up by."""
        return (
            self.chip, self.op, self.gate, self.form, self.dtype, self.n, self.k, self.r,
            self.step, self.layout,
        )  # fmt: skip


Key = tuple[str | int, ...]
table: dict[Key, dict[int, Entry]] = {}  # what was measured, by tokens
_read: list[str] = []  # files already looked at because the environment named them


def entry_for(
    problem: Problem, winner: str, rival: str = "", over: float = 1.0, recipe: str = ""
) -> Entry:
    """What was found for ``problem``."""
    p = joined(problem)
    dtype = str(p.dtype).removeprefix("torch.")
    return Entry(
        here(p.device), p.op, p.step, p.gate, p.form, p.layout, dtype,
        p.m, p.n, p.k, p.r, winner, recipe, rival, over,
    )  # fmt: skip


def add(entries: Iterable[Entry], replace: bool = True) -> None:
    """Let these decide from now on; ``replace`` what is known of the same problems."""
    for e in entries:
        known = table.setdefault(e.key, {})
        if replace or e.m not in known:
            known[e.m] = e


def clear() -> None:
    table.clear()
    _read.clear()


def entries() -> list[Entry]:
    return [e for found in table.values() for e in found.values()]


def lookup(problem: Problem) -> Entry | None:
    """The entry of this shape whose number of tokens is nearest, at most a factor of two away."""
    read_named_file()
    if not table or problem.m < 1:
        return None
    asked = entry_for(problem, "")
    # Of both steps together, then of this one, which counts where both are as near.
    found = table.get(asked._replace(step="", layout="").key, {}) | table.get(asked.key, {})
    nearest = min(found, key=lambda m: abs(math.log2(m / problem.m)), default=None)
    if nearest is None or abs(math.log2(nearest / problem.m)) > _OCTAVES:
        return None
    return found[nearest]


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
    if content["format"] not in (1, FORMAT):
        raise ValueError(f"format {content['format']!r}")
    of_first = content["format"] == 1
    return [_entry(_of_format_1(**fields) if of_first else fields) for fields in content["entries"]]


def _of_format_1(op: str, **fields: Any) -> dict[str, Any]:
    op, gate = OPERATIONS.get(op, (op, ""))
    unsaid = {"step": "", "layout": "", "recipe": "", "form": "two_sided"}
    return unsaid | fields | {"op": op, "gate": gate}


def _entry(fields: dict[str, Any]) -> Entry:
    entry = Entry(**fields)
    for name, value in entry._asdict().items():
        kind: Any = int if name in "mnkr" else (int, float) if name == "over" else str
        if not isinstance(value, kind) or (kind is int and value < 1):
            raise ValueError(f"{name} is {value!r}")
    return entry


def here(device: torch.device) -> str:
    """What measurements are filed under: the chip, and of a CPU the threads in use."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return chip_name(device) + threads
