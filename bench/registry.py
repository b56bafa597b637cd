"""What is measured: shapes, dtypes and effort per suite and device, declared here and only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qrlora_kernels.halves import multiplies

from .case import DTYPES, AnyCase, Case, GridCase, ModelCase, PivotCase

SUITES = ("layer", "decode", "overhead", "start", "memory", "model")
# Sweeps of a quarter of an hour each at most: run with --full, or where they are named.
SWEEPS = ("grid", "pivots", "cpu")

# Families with one definition, so that every variant of a family must give the same numbers.
# "lokr" is OHoRA's product without its start, y = x Wᵀ + (A ⊗ Bᵀ) x: what PEFT and LyCORIS run.
ADAPTERS = ("qr", "lora_xs", "ohora", "lokr")
# Adapters of PEFT that are only neighbours: other mathematics, so they are timed and not gated.
NEIGHBOURS = ("lora", "vera", "kasa", "tinylora", "psoft")


@dataclass(frozen=True)
class Effort:
    """How long each group of interleaved variants is measured; the rounds are split in two runs."""

    seconds: float
    min_rounds: int
    max_rounds: int


EFFORT = {"quick": Effort(1.0, 4, 20), "short": Effort(3.2, 6, 60), "full": Effort(40.0, 10, 400)}
# A sweep spends the same whether named or part of --full.
SWEEP_EFFORT = {
    "grid": Effort(9.0, 10, 80),
    "pivots": Effort(12.0, 4, 60),
    "cpu": Effort(6.0, 6, 60),
}

_CPU_LAYER = {
    "quick": [Case(128, 1024, 1024, 16)],
    "short": [
        *(Case(m, 1024, 1024, 16) for m in (16, 128, 512, 2048)),
        Case(512, 1024, 1024, 16, "fp32"),
        Case(512, 2048, 2048, 64),
    ],
    "full": [
        *(
            Case(m, 1024, 1024, 16, d)
            for d in ("fp32", "bf16", "fp16")
            for m in (1, 16, 128, 512, 2048, 8192)
        ),
        *(Case(m, 1024, 1024, r) for r in (64, 150) for m in (128, 2048)),
        *(Case(512, 4096, 4096, r) for r in (16, 64, 150)),
        Case(512, 14336, 4096, 16),
        Case(512, 4096, 14336, 16),
        Case(199, 736, 1504, 3, "fp32"),
    ],
}
# The most valuable first: a run on a rented GPU may be cut short.
_CUDA_LAYER = {
    "quick": [Case(2048, 4096, 4096, 16)],
    "short": [
        *(Case(2048, 4096, 4096, r) for r in (16, 64, 150)),
        *(Case(m, 4096, 4096, 16) for m in (16, 256, 8192)),
        Case(2048, 14336, 4096, 64),
        Case(2048, 4096, 14336, 64),
    ],
    "full": [
        *(Case(m, 4096, 4096, r) for r in (16, 64, 150) for m in (1, 16, 256, 2048, 8192)),
        *(Case(m, 14336, 4096, r) for r in (16, 64, 150) for m in (16, 2048, 8192)),
        *(Case(m, 4096, 14336, r) for r in (16, 64, 150) for m in (16, 2048, 8192)),
        *(Case(2048, 4096, 4096, 64, dtype) for dtype in ("fp16", "fp32")),
    ],
}
_CPU_DECODE = {
    "quick": [Case(1, 1024, 1024, 16)],
    "short": [Case(m, 2048, 2048, 16) for m in (1, 4, 16)],
    "full": [Case(m, 4096, 4096, r) for r in (16, 64, 150) for m in (1, 2, 4, 8, 16)],
}
_CUDA_DECODE = {
    "quick": [Case(1, 4096, 4096, 16)],
    "short": [Case(m, 4096, 4096, 64) for m in (1, 4, 16)],
    "full": [Case(m, n, 4096, r) for n in (4096, 14336) for r in (16, 64, 150) for m in (1, 4, 16)],
}
_CPU_START = {
    "quick": [Case(0, 512, 512, 16, "fp32")],
    "short": [Case(0, n, n, 150, "fp32") for n in (512, 1024, 2048)],
    "full": [
        Case(0, n, k, r, dtype)
        for n, k in ((1024, 1024), (2048, 2048), (4096, 4096), (4096, 14336))
        for r in (16, 64, 150)
        for dtype in ("fp32", "bf16")
    ],
}
_CUDA_START = {
    "quick": [Case(0, 4096, 4096, 64, "bf16")],
    "short": [Case(0, 4096, k, r, "bf16") for k in (4096, 14336) for r in (64, 150)],
    "full": [
        Case(0, n, k, r, dtype)
        for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
        for r in (16, 64, 150)
        for dtype in ("bf16", "fp32")
    ],
}
_CPU_MEMORY = {
    "quick": [Case(128, 1024, 1024, 16)],
    "short": [Case(2048, 1024, 1024, 16)],
    "full": [Case(2048, 1024, 1024, r, d) for d in ("bf16", "fp32") for r in (16, 150)],
}
_CUDA_MEMORY = {
    "quick": [Case(2048, 4096, 4096, 16)],
    "short": [Case(8192, 4096, 4096, 64)],
    "full": [Case(8192, 4096, 4096, r) for r in (16, 64, 150)],
}
_CPU_MODEL = {
    "quick": [ModelCase("minilm", 2, 64)],
    "short": [ModelCase("minilm", 8, 128), ModelCase("llama-block-1024", 1, 512, dtype="bf16")],
    "full": [
        ModelCase("minilm", 32, 128),
        *(ModelCase("llama-block-1024", 1, length, dtype="bf16") for length in (512, 2048)),
        ModelCase("llama-block-1024", 1, 512),
    ],
}
_CUDA_MODEL = {
    "quick": [ModelCase("llama-block-4096", 1, 2048, dtype="bf16")],
    "short": [
        ModelCase("llama-block-4096", 4, 2048, dtype="bf16"),
        ModelCase("minilm", 128, 128, dtype="bf16"),
    ],
    "full": [
        ModelCase("llama-block-4096", batch, 2048, r, dtype="bf16")
        for batch in (1, 8)
        for r in (16, 150)
    ]
    + [ModelCase("minilm", 128, 128, dtype="bf16")],
}

# A layer whose arithmetic is next to nothing: what is left is the price of a call.
_TINY = [Case(1, 64, 64, 16, dtype) for dtype in ("fp32", "bf16")]
_OVERHEAD = dict.fromkeys(EFFORT, _TINY)

_GRID = [
    GridCase(m, side, side, dtype)
    for dtype in ("bf16", "fp32")
    for m in (1, 16, 512, 2048)
    for side in (384, 768, 1024, 4096)
]
_CPU_GRID = {"quick": [GridCase(16, 384, 384, "bf16")], "short": _GRID, "full": _GRID}

# Squares up to full rank, the linear layers of LLaMA-3-8B, and a list in one call.
_PIVOTS = [
    *(
        PivotCase(n, n, (16, 64, 150, n), dtype)
        for n in (768, 1024, 2048, 4096)
        for dtype in ("fp32", "fp64")
    ),
    PivotCase(768, 768, (150,), count=24),
    *(
        PivotCase(n, k, (150,), "bf16")
        for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
    ),
]
_CPU_PIVOTS = {"quick": [PivotCase(512, 512, (16, 64))], "short": _PIVOTS, "full": _PIVOTS}

# Square layers of three widths, and one that reads four times what it writes.
_SHAPES = {(1024, 1024): (16, 64), (4096, 4096): (64,), (384, 384): (147,), (384, 1536): (147,)}
_ADAPTED = [
    GridCase(m, *shape, dtype, ranks)
    for dtype in ("fp32", "bf16")
    for shape, ranks in _SHAPES.items()
    for m in (16, 128, 512, 2048)
]
_MINUTES = 5 * 10**9  # products of a case that all variants together take so long for
_CPU_ADAPTED = {
    "quick": [GridCase(16, 384, 384, "fp32", (147,))],
    "short": [case for case in _ADAPTED if case.m * case.n * case.k < _MINUTES],
    "full": _ADAPTED,
}
_LOOPED = 3 * 10**8  # products of a case where halves are multiplied one by one: half a second

CASES: Mapping[str, Mapping[str, Mapping[str, Sequence[AnyCase]]]] = {
    "cpu": {
        "layer": _CPU_LAYER,
        "decode": _CPU_DECODE,
        "overhead": _OVERHEAD,
        "start": _CPU_START,
        "memory": _CPU_MEMORY,
        "model": _CPU_MODEL,
        "grid": _CPU_GRID,
        "pivots": _CPU_PIVOTS,
        "cpu": _CPU_ADAPTED,
    },
    "cuda": {
        "layer": _CUDA_LAYER,
        "decode": _CUDA_DECODE,
        "overhead": _OVERHEAD,
        "start": _CUDA_START,
        "memory": _CUDA_MEMORY,
        "model": _CUDA_MODEL,
    },
}
# What the gate-only pass runs: small, odd and even, each dtype.
_GATE = [
    Case(17, 64, 96, 4, "fp32"),
    Case(32, 128, 128, 16, "bf16"),
    Case(5, 96, 64, 3, "fp16"),
]
GATE_CASES: dict[str, Sequence[AnyCase]] = {
    **dict.fromkeys(("layer", "decode", "overhead", "memory"), _GATE),
    "start": [Case(0, 96, 64, 8, "fp32"), Case(0, 64, 96, 8, "bf16")],
    "grid": [GridCase(7, 96, 96, dtype, (3, 16)) for dtype in ("fp32", "bf16")],
    "pivots": [PivotCase(96, 96, (8, 96), "fp64"), PivotCase(64, 96, (8,), count=3)],
    # One whose sums are cut, and one with more tokens than features.
    "cpu": [
        GridCase(17, 48, 1100, "fp32", (3, 5)),
        GridCase(130, 96, 64, "fp32", (3,)),
        GridCase(7, 64, 96, "bf16", (4,)),
    ],
}


def cases(device: str, suite: str, effort: str, gate_only: bool) -> Sequence[AnyCase]:
    """What a suite measures; none where it has nothing for the device."""
    found = CASES[device].get(suite, {}).get(effort, [])
    if gate_only and found:
        return GATE_CASES.get(suite, found)
    return [case for case in found if suite != "cpu" or _is_bearable(case)]


def _is_bearable(case: AnyCase) -> bool:
    """Not where a large product of halves would be a loop on this processor."""
    assert isinstance(case, GridCase)
    few = case.m * case.n * case.k < _LOOPED
    return few or case.dtype == "fp32" or multiplies("cpu", DTYPES[case.dtype])


def effort_for(suite: str, name: str) -> Effort:
    """How long a case of the suite is measured."""
    return EFFORT[name] if name == "quick" else SWEEP_EFFORT.get(suite, EFFORT[name])
