"""A table of what was adapted: one row a layer, and what is worth a word."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from statistics import median

from torch import nn

from ..adapters.options import plain_value
from ..nn import AdapterLinear
from ..nn.derived import kept_bytes
from ..nn.offload import is_away
from ..nn.quantised import nbytes
from .adapt import count_parameters, require_adapted
from .advice import LARGE, followed, trained_at

STANDS_OUT = 3.0  # times the median of the ranks, or as small a part of it


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer.

    ``energy`` is the share of ‖W‖² its basis spans, where it has one; ``factor_bytes`` is what its
    frozen factors take in memory, ``weight_bytes`` its weight, and ``derived_bytes`` what calls
    have computed from these and keep.
    """

    name: str
    adapter: str
    shape: tuple[int, int]
    rank: int
    energy: float | None
    trained: int
    factor_bytes: int
    weight_bytes: int
    backend: str
    reason: str
    derived_bytes: int = 0


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` found; ``kept_bytes``: what calls have computed and keep, all in all.

    Prints as a table, or as one line where the table has been printed already.
    """

    layers: list[LayerSummary]
    parameters: dict[str, int]
    model_bytes: int
    tokens: int
    changed: list[str] = field(default_factory=list)
    kept_bytes: int = 0
    followed: str = ""  # what changed weights changed besides
    shown: bool = False

    def __str__(self) -> str:
        if not self.shown:
            return self.table()
        return f"{len(self.layers)} adapted layers train {self.parameters['adapter']:,} numbers"

    __repr__ = __str__

    def table(self) -> str:
        """A row a layer, the totals, and notes."""
        head = ("layer", "adapter", "shape", "rank", "energy", "trained", "factors", "backend")
        rows = [head, *(self._row(row) for row in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*(line.rstrip() for line in lines), self.totals(), *self._notes()])

    def _row(self, row: LayerSummary) -> tuple[str, ...]:
        return (
            row.name,
            row.adapter,
            f"{row.shape[0]}x{row.shape[1]}",
            f"{row.rank}{'*' if row in self.outliers() else ''}",
            "-" if row.energy is None else f"{row.energy:.1%}",
            f"{row.trained:,}",
            size(row.factor_bytes),
            row.backend,
        )

    def totals(self) -> str:
        """How many numbers train, and what the factors take beside the model."""
        counts = self.parameters
        total = sum(counts.values())
        factors = sum(row.factor_bytes for row in self.layers)
        weights = sum(row.weight_bytes for row in self.layers)
        return (
            f"trained by the adapter {counts['adapter']:,} "
            f"({counts['adapter'] / max(total, 1):.4%} of {total:,}), "
            f"elsewhere {counts['other']:,}, frozen {counts['frozen']:,}\n"
            f"factors {size(factors)}, {factors / max(weights, 1):.0%} of the adapted weights, "
            f"beside a model of {size(self.model_bytes)}"
        )

    def outliers(self) -> list[LayerSummary]:
        """Layers whose rank is far from the others'."""
        middle = median(row.rank for row in self.layers)
        return [
            row
            for row in self.layers
            if row.rank * STANDS_OUT < middle or row.rank > middle * STANDS_OUT
        ]

    def _notes(self) -> list[str]:
        notes = [trained_at(kind) for kind in dict.fromkeys(row.adapter for row in self.layers)]
        large = [row for row in self.layers if row.factor_bytes > LARGE * row.weight_bytes]
        if large:
            notes.append(
                f"note: the factors of {len(large)} of {len(self.layers)} layers are more than a "
                "third of their weight: rank=, max_rank= or another tau makes them smaller"
            )
        if self.kept_bytes:
            kept = size(self.kept_bytes)
            notes.append(f"note: copies computed from frozen tensors take {kept} more")
        if self.outliers():
            middle = median(row.rank for row in self.layers)
            notes.append(f"note: * marks ranks far from the median, {middle:g}")
        if self.changed:
            notes.append(
                f"note: the weights of {', '.join(self.changed)} are not those that their factors "
                "came from; qk.refresh(model) starts again from the weights that are there"
                f"{self.followed}"
            )
        chosen = Counter((row.backend, row.reason) for row in self.layers)
        notes += [
            f"backend at {self.tokens:,} tokens: {name} for {count} of {len(self.layers)} layers "
            f"({reason.partition(';')[0]})"
            for (name, reason), count in chosen.items()
        ]
        return notes


def size(count: int) -> str:
    """A number of bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def summary(model: nn.Module, tokens: int = 2048, show: bool = True) -> Summary:
    """Print a table of the adapted layers: shape, rank, energy kept, numbers, bytes, backend.

    Parameters
    ----------
    model : nn.Module
    tokens : int
        Number of tokens for which the backend is asked.
    show : bool
        Print the table; it is returned either way.

    Raises
    ------
    TypeError, ValueError
        If the model has no adapted layer, or ``tokens`` is no positive integer.
    """
    tokens, show = plain_value("tokens", "int", tokens), plain_value("show", "bool", show)
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    layers = require_adapted(model)
    changed = {name: layer.options for name, layer in layers.items() if layer.base_changed()}
    rows = [_row_of(name, layer, tokens) for name, layer in layers.items()]
    held = sum(nbytes(t) for t in (*model.parameters(), *model.buffers()))
    counts, kept = count_parameters(model), kept_bytes(model)
    result = Summary(rows, counts, held, tokens, [*changed], kept, followed(changed))
    if show:
        print(result)
        return replace(result, shown=True)
    return result


def _row_of(name: str, layer: AdapterLinear, tokens: int) -> LayerSummary:
    choice = layer.explain(tokens)
    return LayerSummary(
        name,
        layer.kind,
        (layer.out_features, layer.in_features),
        layer.rank,
        None if is_away(layer) else layer.energy_kept(),
        layer.trained_parameters(),
        sum(nbytes(factor) for factor in layer.frozen_now().values()),
        nbytes(layer.weight),
        choice.name,
        choice.reason,
        sum(layer.derived.nbytes().values()),
    )
