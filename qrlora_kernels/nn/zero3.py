"""Parameters that DeepSpeed's ZeRO-3 spreads over the ranks and gathers for each forward.

A parameter of it is empty in between, and keeps its shape as ``ds_shape``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_spread(parameter: object) -> bool:
    """Whether this rank holds a part of ``parameter`` alone at the moment."""
    shape = getattr(parameter, "ds_shape", None)
    return shape is not None and getattr(parameter, "shape", shape) != shape


@contextmanager
def gathered(parameters: Iterable[nn.Parameter | None]) -> Iterator[None]:
    """Inside, those of ``parameters`` that are spread are whole; all ranks must call this."""
    spread: list[Any] = [p for p in parameters if is_spread(p)]
    if not spread:
        yield
        return
    deepspeed: Any = importlib.import_module("deepspeed")  # which has spread them
    with deepspeed.zero.GatheredParameters(spread):
        yield
