"""Tables of time and memory: the Kronecker product, and the factorisations of a start."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels.linalg import kron_factors, pivoted_qr, truncated_svd

from .. import llama
from ..llama import gaussian
from ..memory import peak_bytes, saved_bytes
from . import pictures
from .records import Record
from .runner import Workshop
from .scale import Scale
from .table import NOT_AT_HAND, Line, MeasuredTable

REPEATS = 3
TOKENS = 512
LARGEST_SVD = 1536  # a full SVD of a larger matrix takes minutes on two cores
RANK = 64  # where a routine stops early

# Floating-point operations on a square matrix of width n, by Golub & Van Loan, 4th edition.
COUNTS: dict[str, Callable[[int], float]] = {
    "LU": lambda n: 2 * n**3 / 3,
    "QR": lambda n: 8 * n**3 / 3,  # 4/3 for R, as much again to form Q
    "SVD": lambda n: 22 * n**3,  # U, S and V by Golub–Reinsch
}
ROUTINES: dict[str, Callable[[Tensor], Any]] = {
    "LU": torch.linalg.lu_factor,
    "QR": torch.linalg.qr,
    "SVD": lambda weight: torch.linalg.svd(weight, full_matrices=False),
    "kron_factors (OHoRA)": lambda weight: kron_factors(weight, columns="selected"),
    f"pivoted_qr, r = {RANK} (QR-LoRA)": lambda weight: pivoted_qr(weight, rank=RANK),
    f"truncated_svd, r = {RANK} (LoRA-XS)": lambda weight: truncated_svd(weight, RANK),
}


def seconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The median wall time, after one call that is not counted where there are several."""
    times = []
    for repeat in range(repeats + (repeats > 1)):
        begin = time.perf_counter()
        call()
        if repeat or repeats == 1:
            times.append(time.perf_counter() - begin)
    return median(times)


def cost_rows(scale: Scale, _: Workshop) -> list[Record]:
    rows = []
    for width in scale.widths:
        weight = gaussian(width, width, torch.float32)
        for name, routine in ROUTINES.items():
            if name == "SVD" and width > LARGEST_SVD:
                continue
            count = COUNTS[name](width) if name in COUNTS else None
            taken = seconds(lambda: routine(weight))  # noqa: B023
            rows.append({"routine": name, "width": width, "count": count, "seconds": taken})
    return rows


def cost_lines(_: Scale, rows: Sequence[Record]) -> list[Line]:
    found: dict[str, Line] = {}
    for row in rows:
        line = found.setdefault(
            row["routine"],
            {
                "routine": row["routine"],
                "paper": NOT_AT_HAND,
                "operations": f"{row['count'] / row['width'] ** 3:.2f} n³" if row["count"] else "-",
            },
        )
        line[f"n = {row['width']:,}"] = f"{1e3 * row['seconds']:,.1f} ms"
    return list(found.values())


def kron_rows(scale: Scale, _: Workshop) -> list[Record]:
    """One step of OHoRA's layer by both products, and what it keeps and takes."""
    return [
        {"product": product, "width": width, "tokens": TOKENS, **_step(width, product)}
        for width in scale.widths
        for product in ("kron", "materialised")
    ]


def _step(width: int, product: Any) -> dict[str, float | None]:
    linear = nn.Linear(width, width)
    with torch.no_grad():
        linear.weight.copy_(gaussian(width, width, torch.float32))
    layer = qk.OHoRALinear.from_linear(linear, columns="selected", product=product)
    x = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def step() -> None:
        layer(x).sum().backward()

    return {
        "rank": layer.rank,
        "seconds": seconds(step),
        "kept": saved_bytes(lambda: layer(x), x),
        "peak": peak_bytes(step, "cpu"),
    }


def kron_lines(_: Scale, rows: Sequence[Record]) -> list[Line]:
    names = {"kron": "O-Kron", "materialised": "R-Kron (the product is formed)"}
    return [
        {
            "width": f"{row['width']:,}",
            "product": f"{names[row['product']]}, r = {row['rank']}",
            "paper": NOT_AT_HAND,
            "forward and backward": f"{1e3 * row['seconds']:.2f} ms",
            "kept for backward": f"{row['kept'] / 2**20:.2f} MiB",
            "peak of a step": "-" if row["peak"] is None else f"{row['peak'] / 2**20:.2f} MiB",
        }
        for row in rows
    ]


PAPER_LLAMA = {"OHoRA's QR start": "147.5 s", "OHoRA's SVD start": "1,375 s"}  # on an A100
LLAMA_RANKS = (64, 150)
SMALL_PART = 8  # of every side and rank, in a small scale
SVD_SHAPE = (1024, 4096)  # alone, for the others take minutes


def _starts(shape: llama.Shape, part: int) -> dict[str, llama.Start]:
    def pivoted(rank: int) -> llama.Start:
        return lambda weights: pivoted_qr(weights, rank=rank)

    starts: dict[str, llama.Start] = {
        "OHoRA's QR start": lambda weights: kron_factors(weights, columns="selected"),
        "OHoRA's SVD start": lambda weights: kron_factors(weights, columns="selected", start="svd"),
        **{f"pivoted_qr, r = {rank // part}": pivoted(rank // part) for rank in LLAMA_RANKS},
    }
    if shape != tuple(side // part for side in SVD_SHAPE):
        del starts["OHoRA's SVD start"]
    return starts


def llama_rows(scale: Scale, _: Workshop) -> list[Record]:
    """Starts of one layer's matrices, bf16, one matrix in memory at a time."""
    part = 1 if scale.name == "full" else SMALL_PART
    counts = {(n // part, k // part): count for (n, k), count in llama.LAYER.items()}
    return [
        {
            "start": timed.start,
            "shape": list(timed.shape),
            "count": counts[timed.shape],
            "seconds": timed.seconds,
        }
        for timed in llama.timed_starts(
            dict.fromkeys(counts, 1), lambda shape: _starts(shape, part)
        )
    ]


def llama_lines(_: Scale, rows: Sequence[Record]) -> list[Line]:
    shapes = {tuple(row["shape"]) for row in rows}
    found = []
    for name in dict.fromkeys(row["start"] for row in rows):
        own = {tuple(row["shape"]): row for row in rows if row["start"] == name}
        line = {
            "start": name,
            "paper (all layers, A100)": PAPER_LLAMA.get(name, NOT_AT_HAND),
            **{f"{n} × {k}": f"{row['seconds']:.2f} s" for (n, k), row in own.items()},
        }
        if own.keys() == shapes:
            whole = llama.LAYERS * sum(row["count"] * row["seconds"] for row in own.values())
            line[f"{llama.LAYERS} layers of seven matrices"] = f"{whole:,.1f} s"
        found.append(line)
    return found


_TIMED = "Times are of the processor named below and mean little where other work ran beside it."
TABLES = (
    MeasuredTable(
        name="ohora-costs",
        paper="OHoRA, tables 4 and 5",
        title="What QR, SVD and LU cost",
        about="Operations counted (Golub & Van Loan) and times of square matrices in fp32.",
        not_shown=f"A full SVD of more than {LARGEST_SVD:,}. {_TIMED}",
        measure=cost_rows,
        lines=cost_lines,
        draw=pictures.lines_of(
            "width", "seconds", "routine", xscale="log", yscale="log", ylabel="seconds"
        ),
        timed=True,
    ),
    MeasuredTable(
        name="ohora-kron",
        paper="OHoRA, figure 6",
        title="O-Kron against R-Kron in time and memory",
        about=f"One layer, {TOKENS} tokens, fp32, forward and backward.",
        not_shown=f"The paper's GPU. {_TIMED}",
        measure=kron_rows,
        lines=kron_lines,
        draw=pictures.lines_of(
            "width", "seconds", "product", xscale="log", yscale="log", ylabel="seconds a step"
        ),
        timed=True,
    ),
    MeasuredTable(
        name="ohora-llama",
        paper="OHoRA, table 10",
        title="The start of LLaMA-3-8B's shapes on a CPU",
        about="Random weights in bf16, one matrix at a time: each shape once, times how often the "
        f"model has it. With --quick a {SMALL_PART}th of every side and rank, and no more than the "
        "order of the lines to read.",
        not_shown="A full SVD of the larger shapes, which takes minutes each; its quality as a "
        f"start is in `ohora-start`. {_TIMED}",
        measure=llama_rows,
        lines=llama_lines,
        timed=True,
    ),
)
