"""The pivoted QR start of all 224 linear weights of LLaMA-3-8B.

Weights are random, of the model's shapes, in bf16. Before anything is timed the pivots of one
matrix of each shape are checked in fp64: each must be a column of the largest residual norm. On a
GPU all are started in one call, several times. On a CPU they are started layer by layer, once,
those of one shape in a call: they are drawn, started and dropped, and drawing is not timed. The
printed rows are also written to ``llama_start.json``.

    python -m bench.llama_start --out bench/out    # --small: a few tiny matrices, for a sanitizer
    python -m bench.llama_start --device cpu       # --layers 1: one layer, and its seconds times 32
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from qrlora_kernels import native
from qrlora_kernels.linalg import cuda_core, pivoted_qr

from . import llama
from .llama import Shape, gaussian
from .machine import facts

SMALL: dict[Shape, int] = {(300, 200): 2, (70, 310): 2, (33, 5): 1}
RANKS = (16, 64, 150)
TARGET_MS = {150: 500.0}
REPEATS = 5


# --- right before fast --------------------------------------------------------------------------


def first_wrong_pivot(weight: Tensor, pivots: Tensor, rtol: float = 1e-9) -> int | None:
    """The first pivot that is not a column of the largest residual norm in fp64, up to ``rtol``.

    Residual norms² are those of the columns less R's squares, which is exact enough while they are
    no small part of them, as those of random matrices are at ranks well below their sides.
    """
    wide = weight.double()
    basis = torch.linalg.qr(wide[:, pivots]).Q
    explained = (basis.mT @ wide).square_()
    left = torch.linalg.vector_norm(wide, dim=0).square() - explained.cumsum(0) + explained
    taken = left.gather(1, pivots.to(left.device)[:, None])[:, 0]
    wrong = taken < left.max(dim=1).values * (1 - rtol) ** 2
    return int(wrong.int().argmax()) if wrong.any() else None


def wrong_shapes(weights: Iterable[Tensor], rank: int) -> list[str]:
    """Shapes of those of ``weights`` whose pivots, or whose R = QᵀW, do not pass."""
    wrong = []
    for weight in weights:
        found = pivoted_qr(weight, rank=min(rank, *weight.shape), out_dtype=torch.float32)
        step = first_wrong_pivot(weight, found.pivots)
        error = (found.q.double().mT @ weight.double() - found.r).abs().max()
        if step is not None or not error <= 1e-5 * weight.double().norm(dim=0).max():
            wrong.append(f"{tuple(weight.shape)}: pivot {step}, |R - QᵀW| {float(error):.1e}")
    return wrong


# --- all in one call ----------------------------------------------------------------------------


def draw_all(shapes: dict[Shape, int], device: str) -> list[Tensor]:
    every = [shape for shape, count in shapes.items() for _ in range(count)]
    return [gaussian(*shape, torch.bfloat16, device, seed) for seed, shape in enumerate(every)]


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


def rows(weights: list[Tensor], ranks: Sequence[int]) -> list[dict[str, object]]:
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


# --- layer by layer -----------------------------------------------------------------------------


def streamed_rows(ranks: Sequence[int], layers: int) -> list[dict[str, object]]:
    """Seconds of the start of the whole model by rank, and of each shape's part of it.

    Of fewer ``layers`` than the model has they are multiplied, and ``extrapolated`` says so.
    """
    starts = {f"rank {rank}": _start(rank) for rank in ranks}
    taken: dict[str, dict[Shape, float]] = defaultdict(lambda: defaultdict(float))
    for layer in tqdm(range(layers), "layers"):
        for timed in llama.timed_starts(llama.LAYER, lambda _: starts, seed=1000 * layer):
            taken[timed.start][timed.shape] += timed.seconds
    scale = llama.LAYERS / layers

    def row(name: str, of_a_layer: int, seconds: float) -> dict[str, object]:
        return {
            "name": name,
            "matrices": llama.LAYERS * of_a_layer,
            "seconds": scale * seconds,
            "measured_matrices": layers * of_a_layer,
            "measured_seconds": seconds,
            "extrapolated": layers < llama.LAYERS,
        }

    found = []
    for name, by_shape in taken.items():
        found.append(row(name, sum(llama.LAYER.values()), sum(by_shape.values())))
        found += [row(f"{s}, {name}", llama.LAYER[s], seconds) for s, seconds in by_shape.items()]
    return found


def _start(rank: int) -> llama.Start:
    return lambda weights: pivoted_qr(weights, rank=rank)


# --- the command --------------------------------------------------------------------------------


def in_one_call(
    shapes: dict[Shape, int], device: str, ranks: Sequence[int]
) -> list[dict[str, object]] | None:
    """The rows, or None where the device has no core for it or pivots are wrong, which is said."""
    weights = draw_all(shapes, device)
    taken, reason = cuda_core.handles(weights[0])
    print(f"{len(weights)} matrices on {facts()['gpu'] or device}; core: {reason}")
    if device == "cuda" and not taken:
        return None
    first = {tuple(weight.shape): weight for weight in reversed(weights)}
    return None if _refused(first.values(), max(ranks)) else rows(weights, ranks)


def layer_by_layer(ranks: Sequence[int], layers: int) -> list[dict[str, object]] | None:
    """The rows, or None where pivots are wrong, which is said."""
    print(f"{layers} of {llama.LAYERS} layers on {facts()['cpu']}; core: {native.REASON}")
    if layers < llama.LAYERS:
        print(f"seconds of {llama.LAYERS} layers are extrapolated from {layers}")
    one_each = (gaussian(*shape, torch.bfloat16) for shape in llama.LAYER)
    return None if _refused(one_each, max(ranks)) else streamed_rows(ranks, layers)


def _refused(weights: Iterable[Tensor], rank: int) -> bool:
    wrong = wrong_shapes(weights, rank)
    if wrong:
        print("REFUSED: ", *wrong, sep="\n")
    return bool(wrong)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true", help="a few tiny matrices in one call")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ranks", type=int, nargs="+", help="16, 64 and 150 unless given")
    parser.add_argument(
        "--layers",
        type=int,
        choices=range(1, llama.LAYERS + 1),
        metavar=f"1…{llama.LAYERS}",
        default=llama.LAYERS,
        help="measure so many; on a CPU the model's seconds are extrapolated from them",
    )
    options = parser.parse_args(arguments)
    ranks = options.ranks or ((3,) if options.small else RANKS)
    if options.device == "cpu" and not options.small:
        table = layer_by_layer(ranks, options.layers)
    else:
        whole = {shape: options.layers * count for shape, count in llama.LAYER.items()}
        table = in_one_call(SMALL if options.small else whole, options.device, ranks)
    if table is None:
        return 1
    for row in table:
        print(json.dumps(row), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        on_gpu = cuda_core.handles(torch.empty(1, 1, device=options.device))[0]
        record = {"core": on_gpu, **facts(), "rows": table}
        (options.out / "llama_start.json").write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
