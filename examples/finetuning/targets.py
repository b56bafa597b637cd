"""Which layers of an encoder are adapted, by the same names for every library."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from .settings import ALL_LAYERS


def target_names(encoder: nn.Module, targets: Sequence[str], layers: str) -> list[str]:
    """Full names, within ``encoder``, of the linear layers that ``targets`` and ``layers`` mean.

    Parameters
    ----------
    encoder : nn.Module
    targets : sequence of str
        Names or their endings, or a single regular expression, or "all-linear" alone.
    layers : str
        "all", or "last:4" for the last four of the numbered layers.

    Raises
    ------
    ValueError
        If a target names no linear layer, or the model has fewer layers than asked for.
    """
    linear = [n for n, m in encoder.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    if tuple(targets) == ("all-linear",):
        chosen = linear
    else:
        found = {target: _matching(linear, target) for target in targets}
        missing = [target for target, names in found.items() if not names]
        if missing:
            leaves = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"targets must name linear layers, of {leaves}, got {missing}")
        wanted = {name for names in found.values() for name in names}
        chosen = [name for name in linear if name in wanted]
    if layers == ALL_LAYERS:
        return chosen
    count = int(layers.removeprefix("last:"))
    depth = 1 + max((_number(name) for name in linear), default=-1)
    if count > depth:
        raise ValueError(f"layers must be at most 'last:{depth}', got {layers!r}")
    return [name for name in chosen if _number(name) >= depth - count]


def _matching(names: Sequence[str], target: str) -> list[str]:
    by_name = [name for name in names if f".{name}".endswith(f".{target}")]
    return by_name or [name for name in names if re.fullmatch(target, name)]


def _number(name: str) -> int:
    """The layer's number, the first in its name; -1 outside of the numbered layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)
