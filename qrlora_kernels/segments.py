"""Sums over the rows of each adapter of a batch, in an order that the other rows do not change."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _grouped(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows by adapter, in their order; the adapters that are there, and how many rows each."""
    rows = torch.argsort(index, stable=True)
    present, counts = torch.unique_consecutive(index[rows], return_counts=True)
    return rows, present, counts


def segments(index: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(adapter, its rows in their order) for each adapter that ``index`` [M] names."""
    rows, present, counts = _grouped(index)
    yield from zip(present.tolist(), rows.split(counts.tolist()), strict=True)


def sum_by_adapter(terms: Tensor, index: Tensor, adapters: int) -> Tensor:
    """[A, r]: of ``terms`` [M, r] the sum of each adapter's rows, zero where it has none."""
    sums = terms.new_zeros(adapters, terms.shape[1])
    if terms.device.type == "cpu":  # row after row; on a GPU by atomics, in any order
        return sums.index_add_(0, index, terms)
    for adapter, rows in segments(index):
        sums[adapter] = terms[rows].sum(0)
    return sums


def products_by_adapter(h: Tensor, g: Tensor, index: Tensor, adapters: int) -> Tensor:
    """[A, r, r]: hᵀ g over each adapter's rows of h and g [M, r], zero where it has none."""
    sums = h.new_zeros(adapters, h.shape[1], h.shape[1])
    rows, present, counts = _grouped(index)
    if len(counts) and (counts == counts[0]).all():  # rows of as many tokens each, as a rule
        size = int(counts[0])
        left, right = (t[rows].unflatten(0, (-1, size)) for t in (h, g))
        sums[present] = torch.bmm(left.mT, right)
        return sums
    for adapter, own in zip(present.tolist(), rows.split(counts.tolist()), strict=True):
        torch.mm(h[own].mT, g[own], out=sums[adapter])
    return sums
