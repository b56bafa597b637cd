"""Time of a layer's forward and backward on an H200, from counted FLOPs and bytes: a prediction.

Each kernel takes the longer of its arithmetic and its traffic; that of a tiled product is rounded
up to whole waves of tiles. The rates are measured ones of that GPU; what is assumed is named below.
Nothing here is a measurement of these kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from qrlora_kernels.backends.triton import tables

FLOPS = 790e12
BYTES = 4.3e12
# Assumed: a Triton product's share of cuBLAS's rate, and the gap between two kernels of a graph.
TRITON_SHARE = 0.95
GAP = 1.0e-6
H200 = tables.Chip(capability=90, multiprocessors=132, shared=227 * 1024)


@dataclass(frozen=True)
class Kernel:
    flops: float
    bytes: float
    waves: float = 1.0
    share: float = 1.0

    @property
    def seconds(self) -> float:
        arithmetic = self.flops * self.waves / (FLOPS * self.share)
        return max(arithmetic, self.bytes / BYTES) + GAP


def _waves(m: int, n: int) -> float:
    """Whole waves of tiles over the tiles there are."""
    if m <= tables.DECODE_TOKENS:
        return 1.0
    tile = tables.gemm_tile(H200, m, n, 2)
    tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
    return -(-tiles // H200.multiprocessors) * H200.multiprocessors / tiles


def product(m: int, n: int, k: int, rank: int = 0, share: float = 1.0) -> Kernel:
    """x wᵀ + u vᵀ of bf16, the rank padded to its steps."""
    step = tables.rank_step(rank, 2) if rank else 1
    padded = -(-rank // step) * step
    rows = max(m, 16)
    traffic = 2 * (m * k + n * k + m * n + (m + n) * rank)
    return Kernel(2.0 * rows * n * (k + padded), traffic, _waves(m, n), share)


def skinny(m: int, k: int, rank: int) -> Kernel:
    """x bᵀ with its partial sums, if the tokens do not fill the GPU."""
    tile = tables.project_tile(H200, m, rank, 2)
    widths = tables.rank_widths(rank)
    tiles = -(-m // tile.block_m)
    splits = max(1, min(2 * H200.multiprocessors // tiles, k // tile.block_k // 4))
    partial = 8 * splits * m * rank if splits > 1 and m > tables.DECODE_TOKENS else 0
    return Kernel(
        2.0 * max(m, 16) * k * sum(widths), 2 * (m * k + rank * k) + 4 * m * rank + partial
    )


def kron(m: int, n: int, k: int, r: int, backward: bool) -> Kernel:
    """The update alone, forward or with all gradients; the start doubles the chain's products."""
    chain = 2.0 * m * r * (n + k) * 2
    gradients = 2.0 * m * r * (n + 2 * k) if backward else 0.0
    return Kernel(chain + gradients, 2 * m * ((n + 2 * k) if backward else (n + k)), share=0.5)


def seconds(kernels: list[Kernel]) -> float:
    return sum(kernel.seconds for kernel in kernels)


def adapter(m: int, n: int, k: int, rank: int, share: float = TRITON_SHARE) -> float:
    """QR-LoRA or LoRA-XS, forward and backward."""
    forward = [skinny(m, k, rank), product(m, n, k, rank, share)]
    backward = [skinny(m, n, rank), product(m, k, n, rank, share)]
    return seconds(forward + backward)


def composition(m: int, n: int, k: int, rank: int) -> float:
    """The same from library products: the update written out, the base product added onto it."""
    kernels = []
    for out, red in ((n, k), (k, n)):
        scale = Kernel(0.0, 4 * m * rank)
        update = Kernel(2.0 * m * out * rank, 2 * (m * rank + out * rank + m * out))
        onto = product(m, out, red)
        read_back = Kernel(0.0, 2 * m * out - GAP * BYTES)
        kernels += [skinny(m, red, rank), scale, update, onto, read_back]
    return seconds(kernels)


def ohora(m: int, n: int, k: int, r: int) -> float:
    """The Kronecker passes and the library products onto their results, forward and backward."""
    again = Kernel(0.0, 2 * m * (n + k))  # the products also read what they add to
    return seconds(
        [kron(m, n, k, r, False), product(m, n, k), kron(m, n, k, r, True), product(m, k, n), again]
    )


def frozen(m: int, n: int, k: int) -> float:
    return seconds([product(m, n, k), product(m, k, n)])


def table() -> list[str]:
    """Ratios to the frozen linear layer, forward and backward."""
    shapes = [(16, 4096, 4096), (512, 4096, 4096), (2048, 4096, 4096), (8192, 4096, 4096)]
    shapes += [(8192, 14336, 4096), (8192, 4096, 14336)]
    lines = [
        f"At {FLOPS / 1e12:.0f} TFLOP/s, {BYTES / 1e12:.1f} TB/s, {GAP * 1e6:.0f} µs between "
        f"kernels; Triton's products at {TRITON_SHARE:.0%} of the library's.",
        "",
        "| M×N×K | frozen, µs | r=16 | r=64 | r=150 | r=64, Triton at 100% "
        "| r=64, library products | OHoRA r=64 |",
        "|" + "---|" * 8,
    ]
    for m, n, k in shapes:
        base = frozen(m, n, k)
        times = [adapter(m, n, k, rank) for rank in (16, 64, 150)]
        times += [adapter(m, n, k, 64, 1.0), composition(m, n, k, 64), ohora(m, n, k, 64)]
        cells = " | ".join(f"{time / base:.2f}" for time in times)
        lines.append(f"| {m}×{n}×{k} | {base * 1e6:.0f} | {cells} |")
    return lines
