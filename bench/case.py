"""What one measurement is of: a layer, a model, a sweep over ranks, or weights to factorise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Case:
    """One shape: M tokens through W [N, K] with rank r (Kronecker factors choose their own)."""

    m: int
    n: int
    k: int
    r: int
    dtype: str = "bf16"

    weight = 1.0  # of its time beside the other cases', for the estimate of what is left

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

    weight = 2.0

    def __str__(self) -> str:
        return f"{self.name} {self.batch}x{self.length} r={self.r} {self.dtype}"


@dataclass(frozen=True)
class GridCase:
    """One layer W [N, K] with the families at every rank, all variants interleaved."""

    m: int
    n: int
    k: int
    dtype: str
    ranks: tuple[int, ...] = (16, 64, 150)

    def layers(self) -> list[Case]:
        """A case for each rank."""
        return [Case(self.m, self.n, self.k, r, self.dtype) for r in self.ranks]

    @property
    def weight(self) -> float:
        """As of :class:`Case`: copies of W and its products outgrow the fixed part."""
        size = self.n * self.k
        return 1.0 + size / 2e7 + self.m * size / (3e9 if self.dtype == "fp32" else 1.5e10)

    def __str__(self) -> str:
        ranks = ",".join(map(str, self.ranks))
        return f"M={self.m} {self.n}x{self.k} r={ranks} {self.dtype}"


@dataclass(frozen=True)
class PivotCase:
    """``count`` weights [N, K], factorised at each of ``ranks``, or a list of them at once."""

    n: int
    k: int
    ranks: tuple[int, ...]
    dtype: str = "fp32"
    count: int = 1

    @property
    def weight(self) -> float:
        """As of :class:`Case`: LAPACK's time, which grows with N·K·min(N, K)."""
        return 1.0 + self.n * self.k * min(self.n, self.k) / 4e9

    def __str__(self) -> str:
        times = f"{self.count} of " if self.count > 1 else ""
        return f"{times}{self.n}x{self.k} r={','.join(map(str, self.ranks))} {self.dtype}"


AnyCase = Case | ModelCase | GridCase | PivotCase
