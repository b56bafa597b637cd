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
_FAMILIES = (*_RANKED, "ohora")


def run(case: GridCase, options: Options) -> list[Row]:
    """Rows of one layer at all ranks, over one frozen layer measured interleaved with all."""
    return at_all_ranks("grid", case, options, _layers(options))


def at_all_ranks(suite: str, case: GridCase, options: Options, layers: list[Layer]) -> list[Row]:
    """Those of ``layers`` without a rank of the case's once, the others at each rank."""
    built: list[tuple[Row, Task]] = []
    rows: list[Row] = []
    ranked = [one for one in layers if one.adapter in _RANKED]
    for number, one in enumerate(case.layers()):
        problem, found, skipped = build_all(suite, one, options, ranked if number else layers)
        rows += skipped
        if options.gate_only:
            rows += gate_rows(found)
        else:
            built += [(b.row, training(b.runner, problem)) for b in found]
    if options.gate_only:
        return rows
    return with_ratios(timed_rows(built, options, case.m, warmed=True), FLOOR) + rows


def _layers(options: Options) -> list[Layer]:
    """The floor and the plain variants, and this package's library products."""
    known = [one for one in layers_for(options.adapters, options.variants) if one.name in _PLAIN]
    families = {one.adapter for one in known}
    floor = [one for one in layers_for(options.adapters, options.variants) if not one.adapter]
    rivals = [one for one in composed() if one.adapter in families]
    return floor + [one for one in known + rivals if one.adapter in _FAMILIES]
