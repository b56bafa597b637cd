"""Adapted layers over every size, token count and rank: this package against the plain ones."""

from __future__ import annotations

from ..competitors import Layer, layers_for
from ..competitors.ours import NAME, composed
from ..registry import GridCase
from ..rows import Row, with_ratios
from ..timing import Task
from .common import FLOOR, Options, build_all, gate_rows, timed_rows
from .layer import training

_PLAIN = (NAME, "eager", "addmm")
_RANKED = ("qr", "lora_xs")  # a Kronecker product chooses its own rank: one is enough


def run(case: GridCase, options: Options) -> list[Row]:
    """Rows of one layer at all ranks, over one frozen layer measured interleaved with all."""
    built: list[tuple[Row, Task]] = []
    rows: list[Row] = []
    for number, one in enumerate(case.layers()):
        layers = _layers(options, first=number == 0)
        problem, found, skipped = build_all("grid", one, options, layers)
        rows += skipped
        if options.gate_only:
            rows += gate_rows(found)
        else:
            built += [(b.row, training(b.runner, problem)) for b in found]
    if options.gate_only:
        return rows
    return with_ratios(timed_rows(built, options, case.m, warmed=True), FLOOR) + rows


def _layers(options: Options, first: bool) -> list[Layer]:
    """The floor and the variants without a rank once, the others at each rank."""
    known = [one for one in layers_for(options.adapters, options.variants) if one.name in _PLAIN]
    families = {one.adapter for one in known}
    rivals = [one for one in composed() if one.adapter in families]
    ranked = [one for one in known + rivals if one.adapter in _RANKED]
    if not first:
        return ranked
    floor = [one for one in layers_for(options.adapters, options.variants) if not one.adapter]
    return floor + ranked + [one for one in known + rivals if one.adapter == "ohora"]
