"""A table of what was adapted: one row a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .adapt import count_parameters, require_adapted


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer. ``energy`` is the share of ‖W‖² its basis spans, where it has one."""

    name: str
    adapter: str
    shape: tuple[int, int]
    rank: int
    energy: float | None
    trained: int
    backend: str
    reason: str


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` found; prints as a table."""

    layers: list[LayerSummary]
    parameters: dict[str, int]

    def __str__(self) -> str:
        rows = [("layer", "adapter", "shape", "rank", "energy", "trained", "backend")]
        rows += [
            (
                row.name,
                row.adapter,
                f"{row.shape[0]}x{row.shape[1]}",
                str(row.rank),
                "-" if row.energy is None else f"{row.energy:.1%}",
                f"{row.trained:,}",
                row.backend,
            )
            for row in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        reasons = dict.fromkeys(f"{row.backend}: {row.reason}" for row in self.layers)
        counts = self.parameters
        total = sum(counts.values())
        lines.append(
            f"trained by the adapter {counts['adapter']:,} "
            f"({counts['adapter'] / max(total, 1):.4%} of {total:,}), "
            f"elsewhere {counts['other']:,}, frozen {counts['frozen']:,}"
        )
        return "\n".join([*(line.rstrip() for line in lines), *reasons])


def summary(model: nn.Module, tokens: int = 2048, show: bool = True) -> Summary:
    """Print a table of the adapted layers: shape, rank, energy kept, numbers, backend and reason.

    Parameters
    ----------
    model : nn.Module
    tokens : int
        Number of tokens for which the backend is asked.
    show : bool
        Print the table; it is returned either way.

    Raises
    ------
    ValueError
        If the model has no adapted layer.
    """
    rows = []
    for name, layer in require_adapted(model).items():
        choice = layer.explain(tokens)
        shape = (layer.out_features, layer.in_features)
        rows.append(
            LayerSummary(
                name,
                layer.kind,
                shape,
                layer.rank,
                layer.energy_kept(),
                layer.trained_parameters(),
                choice.name,
                choice.reason,
            )
        )
    result = Summary(rows, count_parameters(model))
    if show:
        print(result)
    return result
