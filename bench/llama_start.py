"""The pivoted QR start of all 224 linear weights of LLaMA-3-8B in one call, on a GPU.

Weights are random, of the model's shapes, in bf16. Before anything is timed the pivots of the first
matrix of each shape are checked in fp64: each must be a column of the largest residual norm. The
printed rows are also written to ``llama_start.json``.

    python -m bench.llama_start --out bench/out     # --small: a few tiny matrices, for a sanitizer
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from qrlora_kernels.linalg import cuda_core, pivoted_qr

from .machine import facts

# N, K and how many of them: q and o; k and v; gate and up; down.
LLAMA = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}
SMALL = {(300, 200): 2, (70, 310): 2, (33, 5): 1}
TARGET_MS = {150: 500.0}
REPEATS = 5


def draw(shapes: dict[tuple[int, int], int], device: str) -> list[Tensor]:
    """Gaussian matrices: columns of nearly equal length take the most rounds."""
    torch.manual_seed(0)
    return [
        (torch.randn(rows, columns, device=device) * rows**-0.5).bfloat16()
        for (rows, columns), count in shapes.items()
        for _ in range(count)
    ]


def first_wrong_pivot(weight: Tensor, pivots: Tensor, rtol: float = 1e-9) -> int | None:
    """The first pivot that is not a column of the largest residual norm in fp64, up to ``rtol``."""
    left = weight.to(torch.float64, copy=True)
    for step, pivot in enumerate(pivots.tolist()):
        norms = left.norm(dim=0)
        if float(norms[pivot]) < float(norms.max()) * (1 - rtol):
            return step
        direction = left[:, pivot] / norms[pivot]
        left -= torch.outer(direction, direction @ left)
    return None


def wrong_shapes(weights: list[Tensor], rank: int) -> list[str]:
    """Shapes whose pivots, or whose R = QᵀW, do not pass."""
    first = {tuple(weight.shape): weight for weight in reversed(weights)}
    wrong = []
    for shape, weight in first.items():
        found = pivoted_qr(weight, rank=min(rank, *shape), out_dtype=torch.float32)
        step = first_wrong_pivot(weight, found.pivots)
        error = (found.q.double().mT @ weight.double() - found.r).abs().max()
        if step is not None or not error <= 1e-5 * weight.double().norm(dim=0).max():
            wrong.append(f"{shape}: pivot {step}, |R - QᵀW| {float(error):.1e}")
    return wrong


def milliseconds(weights: list[Tensor], **options: object) -> list[float]:
    """Wall times of whole calls, the device waited for at both ends; the first is not counted."""
    times = []
    for repeat in range(REPEATS + 1):
        _wait(weights[0])
        begin = time.perf_counter()
        pivoted_qr(weights, **options)  # type: ignore[call-overload]
        _wait(weights[0])
        if repeat:
            times.append(1e3 * (time.perf_counter() - begin))
    return times


def measure(weights: list[Tensor], name: str, **options: object) -> dict[str, object]:
    on_gpu = weights[0].is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = milliseconds(weights, **options)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else None
    return {
        "name": name,
        "matrices": len(weights),
        "median_ms": statistics.median(times),
        "least_ms": min(times),
        "most_ms": max(times),
        "extra_MiB": peak,
        "target_ms": TARGET_MS.get(int(str(options.get("rank", 0)))),
    }


def rows(weights: list[Tensor], small: bool) -> list[dict[str, object]]:
    ranks = (3,) if small else (16, 64, 150)
    measured = [measure(weights, f"rank {rank}", rank=rank) for rank in ranks]
    measured.append(measure(weights, "magnitude, tau 0.9", tau=0.9, max_rank=ranks[-1]))
    for shape in Counter(tuple(weight.shape) for weight in weights):
        group = [weight for weight in weights if tuple(weight.shape) == shape]
        measured.append(measure(group, f"{shape}, rank {ranks[-1]}", rank=ranks[-1]))
        measured.append(measure(group[:1], f"one {shape}, rank {ranks[-1]}", rank=ranks[-1]))
    return measured


def _wait(weight: Tensor) -> None:
    if weight.is_cuda:
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    weights = draw(SMALL if options.small else LLAMA, options.device)
    taken, reason = cuda_core.handles(weights[0])
    print(f"{len(weights)} matrices on {facts()['gpu'] or options.device}; core: {reason}")
    if options.device == "cuda" and not taken:
        return 1
    wrong = wrong_shapes(weights, 3 if options.small else 150)
    if wrong:
        print("REFUSED: ", *wrong, sep="\n")
        return 1
    table = rows(weights, options.small)
    for row in table:
        print(json.dumps(row), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        record = {"core": taken, **facts(), "rows": table}
        (options.out / "llama_start.json").write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
