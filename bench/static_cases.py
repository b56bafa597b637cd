"""What the static report compiles: every row of the tile tables on the chips that it serves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from static_compile import meta

from qrlora_kernels.backends import triton
from qrlora_kernels.operands import Kron, KronGradient, LowRank, LowRankGradient

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One layer call. ``padded`` stores Q with rows of whole 16 bytes; ``start`` is OHoRA's."""

    op: str
    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype = BF16
    padded: bool = True
    conv1d: bool = False

    @property
    def name(self) -> str:
        size = "×".join(str(d) for d in (self.m, self.n, self.k))
        notes = [str(self.dtype).removeprefix("torch.")] if self.dtype != BF16 else []
        notes += [] if self.padded else ["unaligned Q"]
        notes += ["transposed weight"] if self.conv1d else []
        return ", ".join([f"{self.op} {size}", f"r={self.r}", *notes])

    def run(self) -> None:
        """Forward and backward on tensors without memory."""
        if self.op == "kron":
            self._run_kron()
            return
        rows = -(-self.r // 8) * 8 if self.padded else self.r
        out_factor = meta(self.n, rows, dtype=self.dtype)[:, : self.r]
        in_factor = meta(self.r, self.k, dtype=self.dtype)
        x, dy, weight = self._layer()
        h = meta(self.m, self.r, dtype=self.dtype)
        bias = meta(self.n, dtype=self.dtype)
        gate = meta(*(self.r,) * (1 if self.op == "qr" else 2), dtype=torch.float32)
        p = LowRank(x, weight, bias, out_factor, in_factor, gate, None, 1.0)
        triton.low_rank_fwd(p, triton.TWO_PHASE)
        back = LowRankGradient(dy, weight, out_factor, in_factor, gate, None, h, 1.0)
        triton.low_rank_bwd(back, triton.TWO_PHASE)

    def _layer(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = meta(self.n, self.k, dtype=self.dtype)
        if self.conv1d:
            weight = meta(self.k, self.n, dtype=self.dtype).t()
        return (
            meta(self.m, self.k, dtype=self.dtype),
            meta(self.m, self.n, dtype=self.dtype),
            weight,
        )

    def _run_kron(self) -> None:
        x, dy, weight = self._layer()
        a, a0 = (meta(self.n // self.r, self.r, dtype=torch.float32) for _ in range(2))
        b, b0 = (meta(self.k // self.r, self.r, dtype=torch.float32) for _ in range(2))
        bias = meta(self.n, dtype=self.dtype)
        triton.kron_fwd(Kron(x, weight, bias, a, b, a0, b0, 1.0), triton.TWO_PHASE)
        triton.kron_bwd(KronGradient(dy, x, weight, a, b, a0, b0, 1.0), triton.LIBRARY_BASE)


# The shape classes of the tables: many tiles, few tiles, decode; both gates; OHoRA's square layer.
EVERYWHERE = (
    Case("qr", 8192, 4096, 4096, 64),
    Case("qr", 64, 1024, 1024, 16),
    Case("qr", 4, 4096, 4096, 64),
    Case("xs", 2048, 4096, 4096, 150),
    Case("kron", 8192, 4096, 4096, 64),
)
# Every row that Hopper may take, and what changes the kernel beside the row.
HOPPER = (
    Case("qr", 8192, 4096, 4096, 150),
    Case("qr", 512, 4096, 4096, 512),
    Case("qr", 8192, 4096, 4096, 150, padded=False),
    Case("qr", 8192, 3072, 768, 16, conv1d=True),
    Case("qr", 512, 1024, 1024, 64, torch.float32),
    Case("qr", 4, 1024, 1024, 16, torch.float32),
    Case("xs", 8192, 4096, 4096, 64),
    Case("xs", 2048, 4096, 4096, 256),
    Case("kron", 8192, 14336, 4096, 64),
    Case("kron", 8192, 4096, 14336, 64),
    Case("kron", 2048, 14336, 14336, 112),
    Case("kron", 2048, 768, 768, 24),
)
CASES: dict[str, tuple[Case, ...]] = {
    "A100": EVERYWHERE,
    "RTX 4090": EVERYWHERE,
    "H200": EVERYWHERE + HOPPER,
    "B200": (*EVERYWHERE, Case("kron", 8192, 14336, 4096, 64)),
}
