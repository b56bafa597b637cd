"""Compile what the Triton launchers would launch, for chips that are not here.

The launchers run unchanged on meta tensors. A driver that knows only a target stands in for that of
a GPU, and every launch becomes a compile: signatures, specialisation and tiles are the real ones.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from qrlora_kernels.backends.triton import common
from qrlora_kernels.backends.triton.tables import Chip

KIB = 1024
# Multiprocessors, and the most shared memory that one block may ask for (CUDA programming guide).
CHIPS = {
    "A100": Chip(capability=80, multiprocessors=108, shared=163 * KIB),
    "RTX 4090": Chip(capability=89, multiprocessors=128, shared=99 * KIB),
    "H200": Chip(capability=90, multiprocessors=132, shared=227 * KIB),
    "B200": Chip(capability=100, multiprocessors=148, shared=227 * KIB),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """One compiled kernel. ``stack`` counts bytes a thread: anything above 0 is a spill."""

    kernel: str
    programs: int
    warps: int
    registers: int
    stack: int
    shared: int
    wgmma: int
    tcgen05: int
    mma: int
    tma_loads: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def blocks_per_multiprocessor(self, chip: Chip) -> int:
        """Resident blocks that registers, threads and shared memory (1 KiB reserved) allow."""
        threads = self.warps * 32
        registers = -(-self.registers // 8) * 8 * threads
        return min(65536 // registers, 2048 // threads, (chip.shared + KIB) // (self.shared + KIB))


class _TargetOnly:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def _resources(name: str, programs: int, compiled: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    ptx = compiled.asm["ptx"]
    return Resources(
        kernel=name,
        programs=programs,
        warps=compiled.metadata.num_warps,
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared=compiled.metadata.shared,
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        tcgen05=len(re.findall(r"tcgen05\.mma", ptx)),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tma_loads=len(re.findall(r"cp\.async\.bulk\.tensor[^;]*shared::[a-z]+\.global", ptx)),
    )


@contextmanager
def compiling_for(chip: Chip) -> Iterator[list[Resources]]:
    """Inside, launches on meta tensors compile for ``chip``; yields what has been compiled."""
    found: list[Resources] = []
    real_run, real_chip = JITFunction.run, common.chip_of

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = real_run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(_resources(self.fn.__name__.strip("_"), grid[0], compiled))
        return compiled

    driver.set_active(_TargetOnly(chip.capability))
    JITFunction.run, common.chip_of = compile_only, lambda device: chip
    try:
        yield found
    finally:
        JITFunction.run, common.chip_of = real_run, real_chip


def compile_case(chip: Chip, case: Callable[[], object]) -> list[Resources]:
    """What ``case`` launches on ``chip``."""
    with compiling_for(chip) as found:
        case()
    return list(found)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor with no memory behind it."""
    return torch.empty(shape, dtype=dtype, device="meta")
