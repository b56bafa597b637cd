"""LLaMA-3-8B's linear weights for timing a start: their shapes, drawn at random a few at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, int]
Start = Callable[[Sequence[Tensor]], Any]

# N, K and how many of them a layer has: q and o; k and v; gate and up; down.
LAYER: dict[Shape, int] = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
LAYERS = 32


class Timed(NamedTuple):
    """Seconds that one start took for so many matrices of a shape, in one call."""

    start: str
    shape: Shape
    matrices: int
    seconds: float


def gaussian(
    rows: int, columns: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Tensor:
    """W [rows, columns] ~ N(0, 1/columns): columns of nearly equal length take the most rounds."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, device=device)
    return weight.mul_(columns**-0.5).to(dtype)


def timed_starts(
    shapes: Mapping[Shape, int], starts: Callable[[Shape], Mapping[str, Start]], seed: int = 0
) -> Iterator[Timed]:
    """Each start of the matrices of each shape, bf16, on the CPU.

    Of so many matrices only those of one shape are in memory, and drawing them is not timed.
    """
    for shape, count in shapes.items():
        weights = [gaussian(*shape, torch.bfloat16, seed=seed + number) for number in range(count)]
        for name, start in starts(shape).items():
            begin = time.perf_counter()
            start(weights)
            yield Timed(name, shape, count, time.perf_counter() - begin)
        del weights  # before the next are drawn
