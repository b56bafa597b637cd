"""Sums over the rows of each adapter of a batch, in an order that the other rows do not change."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def segments(index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Adapters [A'] that have as many rows each, and these [A', size], for each size in ``index``.

    One batched product is for all of them: as a rule rows have as many tokens, and there is one
    size. What it gives an adapter does not depend on how many others are in it.
    """
    rows = torch.argsort(index, stable=True)
    present, counts = torch.unique_consecutive(index[rows], return_counts=True)
    sizes = counts.unique().tolist()
    if len(sizes) == 1:
        yield present, rows.view(-1, sizes[0])
        return
    of_row = counts.repeat_interleave(counts)
    for size in sizes:
        yield present[counts == size], rows[of_row == size].view(-1, size)


def sum_by_adapter(terms: Tensor, index: Tensor, adapters: int) -> Tensor:
    """[A, r]: of ``terms`` [M, r] the sum of each adapter's rows, zero where it has none."""
    sums = terms.new_zeros(adapters, terms.shape[1])
    if terms.device.type == "cpu":  # row after row; on a GPU by atomics, in any order
        return sums.index_add_(0, index, terms)
    for present, rows in segments(index):
        sums[present] = terms[rows].sum(1)
    return sums


def products_by_adapter(h: Tensor, g: Tensor, index: Tensor, adapters: int) -> Tensor:
    """[A, r, r]: hᵀ g over each adapter's rows of h and g [M, r], zero where it has none."""
    sums = h.new_zeros(adapters, h.shape[1], h.shape[1])
    for present, rows in segments(index):
        sums[present] = torch.bmm(h[rows].mT, g[rows])
    return sums


def through_cores(h: Tensor, cores: Tensor, index: Tensor, scaling: float) -> Tensor:
    """s h_m C[index_m] [M, r] for rows of h [M, r] and cores [A, r, r], in h's dtype."""
    out = torch.empty_like(h)
    for present, rows in segments(index):
        out[rows] = torch.bmm(h[rows], (scaling * cores[present]).to(h.dtype))
    return out
