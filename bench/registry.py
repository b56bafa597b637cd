"""What is measured: shapes, dtypes and effort per suite and device, declared here and only here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUITES = ("layer", "decode", "start", "memory", "model")

# Families with one definition, so that every variant of a family must give the same numbers.
# "lokr" is OHoRA's product without its start, y = x Wᵀ + (A ⊗ Bᵀ) x: what PEFT and LyCORIS run.
ADAPTERS = ("qr", "lora_xs", "ohora", "lokr")
# Adapters of PEFT that are only neighbours: other mathematics, so they are timed and not gated.
NEIGHBOURS = ("lora", "vera", "kasa", "tinylora", "psoft")


@dataclass(frozen=True)
class Case:
    """One shape: M tokens through W [N, K] with rank r (Kronecker factors choose their own)."""

    m: int
    n: int
    k: int
    r: int
    dtype: str = "bf16"

    def kron_rank(self) -> int:
        """OHoRA's r_high: the largest common divisor of N and K up to both square roots."""
        common = math.gcd(self.n, self.k)
        limit = math.isqrt(min(self.n, self.k))
        return max(d for d in range(1, limit + 1) if common % d == 0)

    def __str__(self) -> str:
        return f"M={self.m} {self.n}x{self.k} r={self.r} {self.dtype}"


@dataclass(frozen=True)
class ModelCase:
    """One end-to-end step: a model of bench.suites.model by name, batch and sequence length."""

    name: str
    batch: int
    length: int
    r: int = 16
    dtype: str = "fp32"

    def __str__(self) -> str:
        return f"{self.name} {self.batch}x{self.length} r={self.r} {self.dtype}"


@dataclass(frozen=True)
class Effort:
    """How long each group of interleaved variants is measured; the rounds are split in two runs."""

    seconds: float
    min_rounds: int
    max_rounds: int


EFFORT = {"quick": Effort(1.0, 4, 20), "short": Effort(4.0, 6, 60), "full": Effort(40.0, 10, 400)}

_CPU_LAYER = {
    "quick": [Case(128, 1024, 1024, 16)],
    "short": [
        *(Case(m, 1024, 1024, 16) for m in (16, 128, 512, 2048)),
        Case(512, 1024, 1024, 16, "fp32"),
        Case(512, 2048, 2048, 64),
    ],
    "full": [
        *(Case(m, 1024, 1024, 16, d) for d in DTYPES for m in (1, 16, 128, 512, 2048, 8192)),
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
    "short": [
        Case(0, 2048, 2048, 16, "fp32"),
        *(Case(0, n, n, 150, "fp32") for n in (512, 1024, 2048)),
    ],
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

CASES: dict[str, dict[str, dict[str, list[Case]]]] = {
    "cpu": {
        "layer": _CPU_LAYER,
        "decode": _CPU_DECODE,
        "start": _CPU_START,
        "memory": _CPU_MEMORY,
    },
    "cuda": {
        "layer": _CUDA_LAYER,
        "decode": _CUDA_DECODE,
        "start": _CUDA_START,
        "memory": _CUDA_MEMORY,
    },
}
MODEL_CASES = {"cpu": _CPU_MODEL, "cuda": _CUDA_MODEL}
# What the gate-only pass runs: small, odd and even, each dtype.
GATE_CASES = [
    Case(17, 64, 96, 4, "fp32"),
    Case(32, 128, 128, 16, "bf16"),
    Case(5, 96, 64, 3, "fp16"),
]
