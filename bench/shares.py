"""What an adapted layer costs on a CPU as a share of the frozen one, packed and not, and its limit.

The frozen layer that a processor's library runs best is a floor that no adapter moves; LoRA over it
says how much of a row is the adapter and how much the matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .competitors.ours import FROZEN_PREPACKED
from .competitors.rivals import FROZEN_PACKED, OVER_FROZEN, OVER_PACKED
from .losses import NAMES, contests
from .rows import Row
from .suites.common import FLOOR
from .table import by_case, markdown


class Limit(NamedTuple):
    """The share of the frozen packed layer that QR-LoRA may take, from ``least`` tokens on."""

    dtype: str
    side: int
    r: int
    least: int
    share: float


# Of several that apply the last one is meant.
LIMITS = (
    Limit("fp32", 1024, 16, 1, 1.25),
    Limit("fp32", 1024, 16, 512, 1.15),
    Limit("fp32", 1024, 64, 1, 1.25),
    Limit("fp32", 4096, 64, 1, 1.20),
    Limit("fp32", 384, 147, 2048, 1.75),
    Limit("bf16", 1024, 16, 1, 1.35),
    Limit("bf16", 1024, 16, 128, 1.20),
    Limit("bf16", 1024, 16, 512, 1.15),
    Limit("bf16", 4096, 64, 1, 1.10),
)


def limit(row: Row) -> float | None:
    """What is asked of this row; None where nothing is."""
    found = [
        one.share
        for one in LIMITS
        if (row.adapter, row.dtype, row.n, row.k, row.r)
        == ("qr", one.dtype, one.side, one.side, one.r)
        and row.m >= one.least
    ]
    return found[-1] if found else None


def shares_table(rows: list[Row]) -> str:
    """A line for each case and family: ours over both frozen layers and its rivals, its limit."""
    chosen = [r for r in rows if r.suite == "cpu" and r.metric == "both" and r.value]
    lines = [
        ["forward + backward", "M", "r", "of frozen", "of packed", "limit", "", "of eager",
         "of the best rival", "LoRA, of packed", "packed, of frozen"]
    ]  # fmt: skip
    for group in by_case(chosen):
        lines += _lines(group)
    if len(lines) == 1:
        return ""
    return (
        "*packed* is the frozen layer by oneDNN's packed weight, by `prepack`'s, or as PyTorch "
        "calls it, whichever is the fastest: the best frozen layer of this processor. *LoRA* is a "
        "LoRA of rank 8, also by the one or the other.\n\n" + markdown(lines)
    )


def _lines(group: list[Row]) -> Iterator[list[str]]:
    """Of one shape, dtype and number of tokens, at every rank."""
    at = {(row.adapter, row.variant): row for row in group}
    frozen = at.get(("", FLOOR))
    packed = _fastest(frozen, at.get(("", FROZEN_PACKED)), at.get(("", FROZEN_PREPACKED)))
    lora = _fastest(at.get(("lora", OVER_FROZEN)), at.get(("lora", OVER_PACKED)))
    for ours, best in contests(group):
        allowed = limit(ours)
        eager = next((r for r in group if r.variant == "eager" and _same(r, ours)), None)
        yield [
            f"{_named(ours)} {ours.n}×{ours.k} {ours.dtype}",
            str(ours.m),
            str(ours.r),
            _over(ours, frozen),
            _over(ours, packed),
            "" if allowed is None else f"≤ {allowed:.2f}",
            _verdict(ours, packed, allowed),
            _over(ours, eager),
            f"{_over(ours, best)} {best.variant}",
            _over(lora, packed),
            _over(packed, frozen),
        ]


def _named(ours: Row) -> str:
    """The family, and what else the variant's name says."""
    return " ".join([NAMES[ours.adapter], *ours.variant.split(" ")[1:]])


def _same(one: Row, other: Row) -> bool:
    return (one.adapter, one.r) == (other.adapter, other.r)


def _fastest(plain: Row | None, *packed: Row | None) -> Row | None:
    """None where nothing can be packed."""
    found = [row for row in packed if row]
    return min((plain, *found), key=_value) if plain and found else None


def _value(row: Row) -> float:
    return row.value or 0.0


def _over(row: Row | None, base: Row | None) -> str:
    return "–" if row is None or base is None else f"{_value(row) / _value(base):.2f}"


def _verdict(ours: Row, packed: Row | None, allowed: float | None) -> str:
    if packed is None or allowed is None:
        return ""
    return "met" if _value(ours) <= allowed * _value(packed) else "**not met**"
