"""Rows as a benchmark writes them."""

from __future__ import annotations

import dataclasses
from typing import Any

from bench.rows import Row


def recorded(value: float, ratio: float | None, **changes: Any) -> Row:
    made = Row("layer", "eager", "both", adapter="qr")
    numbers = {"value": value, "first": value, "second": value, "ratio": ratio}
    spread = {"q20": 0.99 * value, "q80": 1.01 * value}
    return dataclasses.replace(made, **{**numbers, **spread, **changes})
