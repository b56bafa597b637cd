"""How large the whole is: what the tables multiply their variants by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .cell import Cell

TASKS = ("movies", "tweets", "reviews", "movie-ratings")


@dataclass(frozen=True)
class Scale:
    """Rows, epochs, seeds and tasks; tables take a part of them."""

    name: str
    train_rows: int
    eval_rows: int
    epochs: int
    warmup_epochs: int
    seeds: int
    tasks: tuple[str, ...]
    sizes: tuple[int, ...]  # of training sets, where a table compares them
    widths: tuple[int, ...]  # of square matrices, where a table times routines
    model: str = ""

    def cell(self, adapter: str, task: str, seed: int, **options: Any) -> Cell:
        """A cell of this size; ``options`` are fields of :class:`Cell`."""
        filled = {
            "train_rows": self.train_rows,
            "eval_rows": self.eval_rows,
            "epochs": self.epochs,
            "model": self.model,
            **options,
        }
        return Cell(adapter, task, seed, **filled)

    def of_tasks(self, wanted: Sequence[str]) -> tuple[str, ...]:
        return tuple(task for task in wanted if task in self.tasks)

    def of_seeds(self, wanted: int) -> range:
        return range(min(wanted, self.seeds))


# Some 18 s a run on two cores, two at a time, so that all of it takes less than four hours.
FULL = Scale("full", 600, 500, 2, 3, 5, TASKS, (100, 300, 600, 1500), (384, 768, 1536, 3072))
QUICK = Scale("quick", 128, 128, 1, 1, 1, TASKS[:1], (64, 128), (192, 384, 768))
