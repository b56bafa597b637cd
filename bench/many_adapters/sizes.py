"""How much is measured: all of it, or so little that it shows no more than that it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    resident: tuple[int, ...]  # adapters in the table
    tokens: int  # of a row where batches are compared
    short: int  # and where the times of many calls are looked at
    rounds: int  # of what is timed in turn
    calls: int  # for the percentiles, of adds and of replaces
    in_batch: tuple[int, ...]  # tenants of a batch of ROWS
    tenants: int
    sentences: int  # of a tenant, to train on
    held: int  # to evaluate every tenant on
    epochs: int


ROWS = 64  # of a batch
EACH = 4  # rows of one tenant in a batch that trains
FULL = Sizes((1, 1_000, 100_000), 64, 16, 15, 200, (1, 4, 16, 64), 64, 32, 100, 3)
QUICK = Sizes((1, 100), 16, 8, 2, 5, (1, 4), 4, 8, 10, 1)
