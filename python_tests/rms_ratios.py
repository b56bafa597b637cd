"""How near ``test_no_worse_than_eager`` comes to its limit over 1,000 first seeds.

    python python_tests/rms_ratios.py [seeds]

For each operation, backend and dtype of this machine: the largest ratio of our root mean square
error to eager's that the test would have seen, had it begun at any of so many seeds.
"""

from __future__ import annotations

import os
import sys

import error_bound
import helpers
import torch
from test_contracts import POOLED
from tqdm import tqdm


def largest_ratio(op: str, backend: str, dtype: torch.dtype, seeds: int) -> tuple[str, float]:
    """The name and the ratio of the result that comes nearest to the limit, over all seeds."""
    shape, draws = POOLED["square core"]
    squares: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds + draws - 1):
        got, eager, truth = helpers.pooled(op, backend, dtype, shape, 1, seed)
        for name in truth[0]:
            ours, theirs = (error_bound.rms(result, truth, name) for result in (got, eager))
            squares.setdefault(name, []).append((ours**2, theirs**2))
    ratios = {}
    for name, pairs in squares.items():
        windows = torch.tensor(pairs, dtype=torch.float64).unfold(0, draws, 1).sum(-1)
        ratios[name] = float((windows[:, 0] / windows[:, 1].clamp(min=1e-300)).sqrt().max())
    return max(ratios.items(), key=lambda item: item[1])


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    cases = [
        (op, backend, dtype)
        for op in helpers.OPS
        for dtype in helpers.DTYPES
        for backend in helpers.cpu_backends(op, dtype)
    ]
    for op, backend, dtype in tqdm(cases, file=sys.stderr, disable=not os.isatty(2)):
        name, ratio = largest_ratio(op, backend, dtype, seeds)
        print(f"{op:15} {backend:10} {str(dtype)[6:]:9} {name:7} {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
