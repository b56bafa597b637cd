"""The CUDA sources compile without a spill wherever nvcc is."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from qrlora_kernels.backends import Problem, cuda
from qrlora_kernels.dispatch.problem import joined

CORE = Path(__file__).parents[1] / "csrc" / "core"
TARGETS = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100": "compute_100"}
NVCC = shutil.which("nvcc")
HERE = cuda.available()


class Limits(NamedTuple):
    """Kernels of a source, and the registers a thread and bytes of shared memory a block may take.

    Registers times threads a block decide how many blocks a multiprocessor holds, of 65536.
    """

    kernels: int
    registers: int
    shared: int


LIMITS = {
    # Bytes in flight hide the memory's latency: 4 blocks of 256 threads hold 32 KiB each.
    "decode": Limits(6, 64, 40 << 10),
    "panels": Limits(5, 128, 34 << 10),  # 2 blocks of 256 threads
    "pivot_block": Limits(3, 128, 8 << 10),  # as many blocks as matrices
    "pivot_choose": Limits(12, 64, 24 << 10),  # 2 blocks of 512 threads
    "pivoted_qr": Limits(6, 64, 8 << 10),
    "project": Limits(11, 255, 32 << 10),  # 2 blocks of 128 threads, 64 sums each
}


class Compiled(NamedTuple):
    source: str
    report: str


@pytest.fixture(
    scope="module", params=itertools.product(TARGETS, LIMITS), ids=lambda p: f"{p[0]}-{p[1]}"
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """What ptxas says of each kernel; a warning is an error."""
    if NVCC is None:
        pytest.skip("nvcc was not found")
    target, source = request.param
    command = [NVCC, "-std=c++17", "-O3", "-cubin", f"-I{CORE / 'include'}"]
    command += [f"-gencode=arch={TARGETS[target]},code={target}", "-Xptxas=-v,-warn-spills"]
    command += ["-Werror=all-warnings", str(CORE / "cuda" / f"{source}.cu")]
    out = tmp_path_factory.mktemp("cubin") / f"{source}.cubin"
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Compiled(source, done.stderr)


def test_every_source_is_compiled_here() -> None:
    assert {path.stem for path in (CORE / "cuda").glob("*.cu")} == set(LIMITS)


@pytest.mark.slow
def test_no_kernel_spills(compiled: Compiled) -> None:
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", compiled.report)
    assert len(frames) == LIMITS[compiled.source].kernels
    assert set(frames) == {("0", "0")}


def test_blocks_fit_a_multiprocessor(compiled: Compiled) -> None:
    limits = LIMITS[compiled.source]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", compiled.report)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", compiled.report)]
    assert max(registers) <= limits.registers
    assert max(shared) <= limits.shared


def test_supports_says_why_not() -> None:
    def ask(device: str, op: str, dtype: torch.dtype, **more: Any) -> Any:
        problem = Problem(op, torch.device(device), dtype, 1, 64, 64, 8, **more)
        return cuda.supports(joined(problem))

    assert ask("cpu", "qr_linear", torch.bfloat16) == "CUDA kernels run on CUDA devices, not cpu"
    assert ask("cuda:0", "kron_linear", torch.bfloat16) == "no CUDA kernel for kron"
    assert "a backward" in ask("cuda:0", "qr_linear", torch.bfloat16, step="bwd")
    assert "rows are contiguous" in ask("cuda:0", "qr_linear", torch.bfloat16, layout="columns")
    assert "not torch.float64" in ask("cuda:0", "qr_linear", torch.float64)
    if not HERE[0]:
        assert ask("cuda:0", "qr_linear", torch.bfloat16) == HERE[1]
