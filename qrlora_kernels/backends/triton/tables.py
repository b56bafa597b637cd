"""Tile sizes per chip and shape class. Plain data: importing this needs neither Triton nor a GPU.

Every row is compiled in the tests for the chips that it serves: its shared memory must fit, and no
register may spill. The figures behind the choices are in bench/notes/triton.md.
"""

from __future__ import annotations

from dataclasses import dataclass

DECODE_TOKENS = 16
"""Up to this many tokens the work is reading the weight once, not multiplying."""

MAX_RANK = 512
MAX_CORE_RANK = 256
"""Beyond this an r x r core no longer stays on chip beside the rows that it multiplies."""


@dataclass(frozen=True)
class Chip:
    """What the tile choice depends on. ``shared`` is the most bytes one block may ask for."""

    capability: int
    multiprocessors: int
    shared: int

    @property
    def has_tma(self) -> bool:
        return self.capability >= 90


@dataclass(frozen=True)
class GemmTile:
    """Tile of a matrix product [block_m, block_n] that walks its reduction by ``block_k``."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ProjectTile:
    """Tile of the skinny product: ``block_m`` tokens, ``block_k`` of the reduction a step."""

    block_m: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class KronTile:
    """``tokens`` per step of the Kronecker kernels, the padded factors, and the programs that
    stay on a multiprocessor."""

    tokens: int
    block_r: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    resident: int


# From the largest tile down: the first one that gives every multiprocessor a tile is taken.
_HOPPER = (GemmTile(128, 256, 64, 8, 3), GemmTile(128, 128, 64, 8, 4), GemmTile(64, 64, 64, 4, 4))
# Addresses take registers where there are no descriptors, so the accumulators get fewer.
_AMPERE = (GemmTile(128, 128, 32, 8, 4), GemmTile(64, 64, 64, 4, 3))
_SAFE = (GemmTile(128, 128, 32, 8, 3), GemmTile(64, 64, 32, 4, 3))
# Without tensor cores a library product wins; these rows are for a call that asks for Triton.
_FLOAT32 = (GemmTile(32, 32, 16, 4, 3),)
# Few tokens: what counts is bytes of the weight in flight.
_DECODE = (GemmTile(16, 32, 256, 4, 5), GemmTile(16, 16, 256, 4, 5))
_DECODE_SAFE = (GemmTile(16, 32, 256, 4, 3), GemmTile(16, 16, 256, 4, 3))
_DECODE_FLOAT32 = (GemmTile(16, 16, 32, 4, 3),)

BIG_SHARED = 160 * 1024
"""Data-centre chips offer at least this much shared memory to a block, others about 99 KiB."""


def gemm_tile(chip: Chip, m: int, n: int, itemsize: int) -> GemmTile:
    """The tile for an [m, n] product of elements of ``itemsize`` bytes."""
    rows: tuple[GemmTile, ...]
    if m <= DECODE_TOKENS:
        half = _DECODE if chip.shared >= BIG_SHARED else _DECODE_SAFE
        rows = half if itemsize == 2 else _DECODE_FLOAT32
    elif itemsize == 4:
        rows = _FLOAT32
    elif chip.shared < BIG_SHARED:
        rows = _SAFE
    else:
        rows = _HOPPER if chip.has_tma else _AMPERE
    for tile in rows:
        if -(-m // tile.block_m) * -(-n // tile.block_n) >= chip.multiprocessors:
            return tile
    return rows[-1]


def project_tile(chip: Chip, m: int, rank: int, itemsize: int) -> ProjectTile:
    """The tile of h = x rᵀ, whose few columns make it a stream over x."""
    if m <= DECODE_TOKENS:
        stages = 6 if chip.shared >= BIG_SHARED else 3
        return ProjectTile(16, 256 if itemsize == 2 else 64, 4, stages)
    if itemsize == 4:
        return ProjectTile(32, 32, 4, 3)
    if chip.shared >= BIG_SHARED and m >= 64 * chip.multiprocessors // 2:
        return ProjectTile(128, 64, 8, 4)
    return ProjectTile(64, 64, 8 if rank > 128 or chip.shared < BIG_SHARED else 4, 3)


def rank_widths(rank: int) -> tuple[int, int]:
    """Two powers of two that cover ``rank`` with little waste: 150 -> (128, 32), 64 -> (64, 0).

    A tile's width must be a power of two; two accumulators side by side reach the sizes between.
    """
    width = 16
    while width < min(rank, 256):
        width *= 2
    if width <= 64 or rank > 3 * width // 4:
        return width, 0
    rest = 16
    while width // 2 + rest < rank:
        rest *= 2
    return width // 2, rest


def rank_step(rank: int, itemsize: int) -> int:
    """Step of the second phase over the rank: the widest that pads least.

    float32 goes without tensor cores and holds the whole step in registers.
    """
    if itemsize == 4:
        return 16
    return min((64, 32, 16), key=lambda step: (-(-rank // step) * step, -step))


def padded(size: int) -> int:
    """The power of two that holds ``size``, at least the 16 of a tensor core's step."""
    return max(16, 1 << (size - 1).bit_length())


def max_factor(chip: Chip) -> int:
    """Largest padded Kronecker factor, in elements, that a chip's kernels hold on chip."""
    if chip.has_tma and chip.shared >= BIG_SHARED:
        return 16384
    return 4096


def fits_one_pass(na: int, kb: int, r: int, chip: Chip) -> bool:
    """Whether dA, dB and dx of factors [na, r] and [kb, r] fit the registers of one kernel.

    Without descriptors the addresses of every tile take registers too.
    """
    return chip.has_tma and max(padded(na), padded(kb)) * padded(r) <= 8192


def kron_tile(na: int, kb: int, r: int, itemsize: int, chip: Chip, backward: bool) -> KronTile:
    """Tile of the Kronecker kernels: the factors stay on chip, 64 rows of tokens pass through."""
    block_r, block_n, block_k = padded(r), padded(na), padded(kb)
    tokens = max(1, 64 // block_r)
    small = max(block_n, block_k) * block_r <= 8192
    if backward:
        warps, resident = (4, 2) if fits_one_pass(na, kb, r, chip) else (8, 1)
        return KronTile(tokens, block_r, block_n, block_k, warps, 1, resident)
    block_n = min(block_n, 128 if chip.capability >= 100 else 256)
    # Both factors, each with its change, and two tiles of tokens on their way.
    factors = 2 * (block_n + block_k) * block_r * itemsize
    stages = 2 if factors + 4 * tokens * block_r * block_k * itemsize <= chip.shared else 1
    warps, resident = (4, 4) if small else (8, 1)
    return KronTile(tokens, block_r, block_n, block_k, warps, stages, resident)
