"""What the rows of one batch have of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.low_rank import LowRank
from ..nn.per_row import ByRow, Rows
from .layout import Layout
from .slots import Slot


class Batch:
    """The adapters of a batch, with a copy of their numbers from the time that it began.

    Attributes
    ----------
    names : list of str
        Of the rows.
    distinct : list of str
        Each name once.
    numbers : Tensor [A, P]
        A leaf whose gradient, after a backward, is that of each of ``distinct``.
    place : Tensor [B], int64
        Of each row in ``distinct``.
    """

    def __init__(
        self,
        layout: Layout,
        names: list[str],
        distinct: list[str],
        slots: list[Slot | None],
        numbers: Tensor,
        rank: int | None,
    ) -> None:
        self.names, self.distinct, self.slots = names, distinct, slots
        at = {name: i for i, name in enumerate(distinct)}
        self.place = torch.tensor([at[name] for name in names], device=numbers.device)
        self.numbers = numbers.requires_grad_(torch.is_grad_enabled())
        self._own = layout.by_module(self.numbers)
        if rank is not None:
            self._own = {m: _first(m, own, rank) for m, own in self._own.items()}

    def mean(self, losses: Tensor) -> Tensor:
        """The sum over adapters of the mean loss [] of their rows, from ``losses`` [B].

        Its gradient is for each adapter what training it alone on its rows would give.
        """
        if losses.shape != self.place.shape:
            raise ValueError(
                f"losses must have one number for each of {len(self.place)} rows, got shape "
                f"{list(losses.shape)}"
            )
        place = self.place.to(losses.device)
        counts = torch.bincount(place, minlength=len(self.distinct)).to(losses.dtype)
        sums = losses.new_zeros(len(self.distinct)).index_add(0, place, losses)
        return (sums / counts).sum()

    def has(self, module: nn.Module) -> bool:
        """See :class:`qrlora_kernels.nn.per_row.Source`."""
        return module in self._own

    def rows_of(self, module: nn.Module, x: Tensor) -> Rows:
        """See :class:`qrlora_kernels.nn.per_row.Source`."""
        own = self._own[module]
        if x.dim() < 2 or len(x) != len(self.place):
            raise ValueError(
                f"names must be as many as the batch has rows, got {len(self.place)} names and an "
                f"input of shape {list(x.shape)}"
            )
        if self.place.device != x.device:  # a model over several devices
            own = {key: tensor.to(x.device) for key, tensor in own.items()}
            return Rows(own, self.place.to(x.device))
        return Rows(own, self.place)


def _first(module: nn.Module, own: dict[str, Tensor], rank: Any) -> dict[str, Tensor]:
    """The gates of the first ``rank`` directions; a head stays as it is."""
    if not isinstance(module, ByRow):
        return own
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive int, got {rank!r}")
    if not issubclass(module.adapter, LowRank):
        raise ValueError("rank must be None over OHoRA, whose factors have no order")
    ((key, gates),) = own.items()
    if rank >= gates.shape[-1]:
        return own
    return {key: gates[:, :rank, :rank] if module.adapter.square else gates[:, :rank]}
