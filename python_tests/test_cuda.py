"""The CUDA sources compile without a spill wherever nvcc is; on a GPU they match fp64."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import SCALING

from qrlora_kernels.backends import Problem, cuda

CSRC = Path(__file__).parents[1] / "csrc"
TARGETS = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100": "compute_100"}
NVCC = shutil.which("nvcc")
HERE = cuda.available()


@pytest.fixture(scope="module", params=TARGETS)
def ptxas_report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What ptxas says of each kernel; a warning is an error."""
    if NVCC is None:
        pytest.skip("nvcc was not found")
    target = request.param
    command = [NVCC, "-std=c++17", "-O3", "-cubin", f"-I{CSRC / 'include'}"]
    command += [f"-gencode=arch={TARGETS[target]},code={target}", "-Xptxas=-v,-warn-spills"]
    command += ["-Werror=all-warnings", str(CSRC / "cuda" / "decode.cu")]
    out = tmp_path_factory.mktemp("cubin") / "decode.cubin"
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_no_kernel_spills(ptxas_report: str) -> None:
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", ptxas_report)
    assert len(frames) == 6, "three kernels in two dtypes"
    assert set(frames) == {("0", "0")}


def test_four_blocks_fit_a_multiprocessor(ptxas_report: str) -> None:
    """Bytes in flight hide the memory's latency: 4 blocks of 256 threads hold 32 KiB each."""
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", ptxas_report)) <= 64
    assert max(int(n) for n in re.findall(r"(\d+) bytes smem", ptxas_report)) <= 40 * 1024


def test_supports_says_why_not() -> None:
    def ask(device: str, op: str, dtype: torch.dtype) -> tuple[bool, str]:
        return cuda.supports(Problem(op, torch.device(device), dtype, 1, 64, 64, 8))

    assert ask("cpu", "qr_linear", torch.bfloat16) == (
        False,
        "CUDA kernels run on CUDA devices, not cpu",
    )
    assert ask("cuda:0", "kron_linear", torch.bfloat16) == (False, "no CUDA kernel for kron_linear")
    assert "not torch.float64" in ask("cuda:0", "qr_linear", torch.float64)[1]
    if not HERE[0]:
        assert ask("cuda:0", "qr_linear", torch.bfloat16) == HERE


@pytest.mark.skipif(not HERE[0], reason=f"CUDA kernels cannot run here: {HERE[1]}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 3, 16])
@pytest.mark.parametrize(("n", "k", "r"), [(4096, 4096, 64), (1003, 737, 150), (24, 40, 3)])
@pytest.mark.parametrize("op", ["qr_linear", "lora_xs_linear"])
def test_decode_against_fp64(op: str, n: int, k: int, r: int, m: int, dtype: Any) -> None:
    given = helpers.operands(op, m, n, k, r, dtype)
    t = {name: v.cuda() for name, v in given.items()}
    operands = [t["x"], t["weight"], t["bias"], *(t[name] for name in helpers.OPERANDS[op])]
    with helpers.poisoned_memory():
        y, h = getattr(cuda, f"{op}_fwd")(*operands, SCALING)
        again, _ = getattr(cuda, f"{op}_fwd")(*operands, SCALING)
    assert helpers.same_bits(y, again)
    projection = given["r" if op == "qr_linear" else "a"]
    got = {"y": y.cpu(), "h": h.cpu()}
    eager = {"y": helpers.plain(op, given), "h": given["x"] @ projection.T}
    truth = {"y": helpers.exact(op, given), "h": given["x"].double() @ projection.double().T}
    helpers.assert_error_rule(got, eager, truth, dtype)
