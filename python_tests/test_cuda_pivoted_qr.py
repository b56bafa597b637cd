"""The CUDA core of pivoted_qr: its device code run on the CPU through an emulation, and on a GPU.

The tests named emulated, and those with the fixture ``emulated``, say nothing about a GPU: they
show that the algorithm is right and does not depend on the order of threads and blocks. The other
implementations' tests in test_pivoted_qr.py run on the emulated core as well.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import poisoned_memory, same_bits
from pivot_matrices import assert_greedy, gaussian, lapack, matrices
from torch import Tensor

from bench import llama_start
from qrlora_kernels import native
from qrlora_kernels.__main__ import report
from qrlora_kernels.linalg import PivotedQR, cpu_core, cuda_core, pivoted_qr
from qrlora_kernels.linalg.jobs import Job

GPU_MISSING = (
    "no CUDA device"
    if not torch.cuda.is_available()
    else "the native core has no CUDA part"
    if not hasattr(native.CORE, "CudaPivots")
    else ""
)


@pytest.fixture
def emulated(emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(cuda_core, "CORE", emulated_cuda)
    monkeypatch.setattr(cuda_core, "DEVICE_TYPE", "cpu")
    emulated_cuda.set_schedule(0)
    return emulated_cuda


def same_results(one: list[PivotedQR], other: list[PivotedQR]) -> bool:
    return all(
        same_bits(getattr(a, name), getattr(b, name))
        for a, b in zip(one, other, strict=True)
        for name in ("q", "r", "pivots", "diagonal")
    )


def one_shape(n: int = 160) -> list[Tensor]:
    """Matrices of one shape that end after different numbers of rounds."""
    near = gaussian(n, n, 1)
    near[:, n // 2 :] = near[:, : n // 2] + 1e-7 * gaussian(n, n // 2, 2)
    return [
        gaussian(n, n, 3),
        gaussian(n, 6, 4) @ gaussian(6, n, 5),
        near,
        gaussian(n, n, 6) * torch.logspace(0, -12, n, dtype=torch.float64),
        torch.eye(n, dtype=torch.float64),
    ]


def jobs(weights: list[Tensor], limit: int) -> list[Job]:
    return [Job("a matrix", weight, limit, weight.dtype) for weight in weights]


def refreshing() -> list[Tensor]:
    """Matrices whose bounds grow too loose, so that most columns are recomputed in fp64."""
    deficient = gaussian(100, 40, 9) @ gaussian(40, 300, 10)
    return [deficient, gaussian(100, 1, 5) + 1e-5 * gaussian(100, 300, 6), gaussian(100, 300, 7)]


def test_emulation_notices_planted_faults(emulated_cuda: ModuleType) -> None:
    def neighbours(wait: bool) -> set[tuple[int, ...]]:
        found = set()
        for schedule in (0, 1, 7):
            emulated_cuda.set_schedule(schedule)
            found.add(tuple(emulated_cuda.neighbours(wait)))
        emulated_cuda.set_schedule(0)
        return found

    assert neighbours(wait=True) == {(*range(2, 65), 1)}
    assert len(neighbours(wait=False)) == 3
    with pytest.raises(RuntimeError, match=r"barrier of .*module\.cpp"):
        emulated_cuda.half_a_barrier()
    assert not emulated_cuda.tall_grid()
    assert neighbours(wait=True) == {(*range(2, 65), 1)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(
    emulated: ModuleType, dtype: torch.dtype
) -> None:
    """Fault: atomics or a missing barrier. Fresh memory is poisoned in between."""
    weights = [weight.to(dtype) for weight in one_shape(140) + refreshing()]
    first = pivoted_qr(weights, rank=None, tau=1e-9)
    for schedule in (0, 1, 5):
        emulated.set_schedule(schedule)
        with poisoned_memory():
            assert same_results(first, pivoted_qr(weights, rank=None, tau=1e-9)), schedule
    emulated.set_schedule(0)


@pytest.mark.usefixtures("emulated")
def test_a_batch_gives_what_single_matrices_give(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = one_shape()
    together = pivoted_qr(weights, tau=1e-8)
    assert len({found.rank for found in together}) >= 4
    assert same_results(together, [pivoted_qr(weight, tau=1e-8) for weight in weights])
    one_by_one = cuda_core._core(weights[0], 1, 160, 0.0, True).workspace_bytes()
    monkeypatch.setattr(cuda_core, "_free_bytes", lambda _: 4 * 2 * one_by_one)
    assert same_results(together, pivoted_qr(weights, tau=1e-8))
    monkeypatch.setattr(cuda_core, "_FIRST_LIMIT", 20)
    assert same_results(together, pivoted_qr(weights, tau=1e-8))
    for weight, found in zip(weights, together, strict=True):
        assert_greedy(found.pivots, weight)
        diagonal = lapack(weight)[1]
        assert found.rank == int((diagonal > 1e-8 * diagonal[0]).sum())


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_bounds_are_refreshed_over_several_rounds(dtype: torch.dtype) -> None:
    weights = [weight.to(dtype) for weight in refreshing()]
    [batch] = cuda_core._batches(jobs(weights, 90), factors=False)
    batch.open(0.0, batch.empty(3, 300, dtype=torch.float64).data_ptr())
    batch.core.start()
    phases = []
    while batch.core.round():
        phases.append(batch.states[:, 4].tolist())
    refresh, done = 2, 3
    assert any(now[i] == after[i] == refresh for now, after in pairwise(phases) for i in range(3))
    assert any({refresh, done} <= set(phase) for phase in phases)
    for i, weight in enumerate(weights):
        assert_greedy(batch.pivots[i, : int(batch.states[i, 0])], weight)


@pytest.mark.usefixtures("emulated")
def test_one_batch_a_shape() -> None:
    weights = [gaussian(40, 30, i) for i in range(3)] + [gaussian(30, 40), gaussian(40, 30).T]
    weights += [gaussian(40, 30, 5).float()]
    batches = list(cuda_core._batches(jobs(weights, 9), factors=False))
    assert sorted(batch.members for batch in batches) == [[0, 1, 2], [3], [4], [5]]


@pytest.mark.parametrize("name", ["gaussian", "geometric_spectrum", "near_duplicates", "wide"])
def test_emulated_torch_and_cpu_agree(
    name: str, emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = matrices()[name]
    assert cpu_core.CORE is not None
    results = [pivoted_qr(weight, rank=110)]
    monkeypatch.setattr(cpu_core, "CORE", None)
    results.append(pivoted_qr(weight, rank=110))
    monkeypatch.setattr(cuda_core, "CORE", emulated_cuda)
    monkeypatch.setattr(cuda_core, "DEVICE_TYPE", "cpu")
    results.append(pivoted_qr(weight, rank=110))
    for other in results[:2]:
        assert torch.equal(results[2].pivots, other.pivots)
        torch.testing.assert_close(results[2].diagonal, other.diagonal, rtol=1e-9, atol=0)
        torch.testing.assert_close(results[2].r, other.r, rtol=0, atol=1e-11)


def test_emulated_pivots_of_a_llama_shape(
    emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpu_core.CORE is not None
    weight = gaussian(1024, 4096).bfloat16()
    expected = pivoted_qr(weight, rank=150)
    monkeypatch.setattr(cuda_core, "CORE", emulated_cuda)
    monkeypatch.setattr(cuda_core, "DEVICE_TYPE", "cpu")
    found = pivoted_qr(weight, rank=150)
    assert torch.equal(found.pivots, expected.pivots)
    torch.testing.assert_close(found.diagonal, expected.diagonal, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.r, expected.r, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bounds_hold_where_fp32_sums_are_long(dtype: torch.dtype) -> None:
    """Fault: one long fp32 sum of terms of one sign, as of columns that nearly repeat a pivot."""
    column = gaussian(20000, 1).abs()
    weight = (column + 1e-3 * gaussian(20000, 160, 1).abs()).to(dtype)
    [batch] = cuda_core._batches(jobs([weight], 160), factors=False)
    bounds = batch.empty(1, 160, dtype=torch.float64)
    batch.open(0.0, bounds.data_ptr())
    batch.core.start()
    assert batch.core.round() == 1
    batch.core.store_bounds()
    taken = batch.pivots[0, : int(batch.states[0, 0])]
    basis = torch.linalg.qr(weight[:, taken].double()).Q
    left = weight.double() - basis @ (basis.mT @ weight.double())
    left[:, taken] = 0
    assert len(taken) == 1
    start2 = weight.double().square().sum(0)
    assert (bounds[0] >= left.square().sum(0) - 1e-13 * start2).all()
    assert (bounds[0] <= 1e-5 * start2).all()


def test_handles_says_why_not(emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(4, 4)
    assert cuda_core.handles(weight) == (False, "the matrix is on cpu")
    monkeypatch.setattr(cuda_core, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda_core, "CORE", object())
    assert cuda_core.handles(weight) == (False, "the native core has no CUDA part")
    monkeypatch.setattr(cuda_core, "CORE", emulated_cuda)
    assert cuda_core.handles(weight, "magnitude") == (True, "CUDA core")
    assert "energy rule" in cuda_core.handles(weight, "energy")[1]
    wide = torch.empty(1, 1).expand(1, 65535 * 128 + 1)
    assert cuda_core.handles(wide) == (False, f"more than {65535 * 128} columns")
    monkeypatch.setenv("QRLORA_CUDA_PIVOTED_QR", "0")
    assert cuda_core.handles(weight) == (False, "QRLORA_CUDA_PIVOTED_QR=0")
    assert "CUDA tensors: torch operations, QRLORA_CUDA_PIVOTED_QR=0" in report()


@pytest.mark.usefixtures("emulated")
def test_an_error_of_progress_ends_the_search() -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cuda_core.search(jobs([gaussian(300, 300)], 200), None, stop)


@pytest.mark.usefixtures("emulated")
def test_a_core_that_never_ends_is_an_error() -> None:
    [batch] = cuda_core._batches(jobs([gaussian(8, 8)], 8), factors=False)
    batch.core = SimpleNamespace(round=lambda: 1)
    with pytest.raises(RuntimeError, match="does not end on 1 matrices"):
        batch.run(0, lambda _: None)


@pytest.mark.skipif(bool(GPU_MISSING), reason=f"the CUDA core cannot run here: {GPU_MISSING}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gpu_pivots_are_those_of_geqp3(dtype: torch.dtype) -> None:
    cases = {name: weight.clamp(-6e4, 6e4).to(dtype) for name, weight in matrices().items()}
    on_gpu = {name: weight.cuda() for name, weight in cases.items()}
    assert all(cuda_core.handles(weight)[0] for weight in on_gpu.values())
    found = pivoted_qr(list(on_gpu.values()), rank=150)
    with poisoned_memory():
        again = pivoted_qr(list(on_gpu.values()), rank=150)
    assert same_results(found, again)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype)
    for name, one in zip(cases, found, strict=True):
        assert_greedy(one.pivots.cpu(), cases[name])
        if tolerance:
            q = one.q.double()
            assert (q.mT @ q - torch.eye(one.rank).to(q)).abs().max() <= tolerance, name


@pytest.mark.skipif(bool(GPU_MISSING), reason=f"the CUDA core cannot run here: {GPU_MISSING}")
def test_gpu_takes_the_current_stream_and_mixed_states() -> None:
    """Fault: kernels on the default stream. The weights are made on another one."""
    with torch.cuda.stream(torch.cuda.Stream()):
        weights = [weight.cuda(non_blocking=True) for weight in one_shape()]
        together = pivoted_qr(weights, tau=1e-8)
    torch.cuda.synchronize()
    assert same_results(together, [pivoted_qr(weight, tau=1e-8) for weight in weights])
    assert len({found.rank for found in together}) >= 4


@pytest.mark.usefixtures("emulated")
def test_the_model_wide_benchmark_checks_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert llama_start.main(["--small", "--device", "cpu", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "llama_start.json").read_text())
    assert record["core"] is True
    assert record["rows"][0]["matrices"] == 5
    weight = gaussian(50, 40)
    pivots = lapack(weight)[0][:20]
    assert llama_start.first_wrong_pivot(weight, pivots) is None
    pivots[[7, 8]] = pivots[[8, 7]]
    assert llama_start.first_wrong_pivot(weight, pivots) == 7
    monkeypatch.setattr(llama_start, "first_wrong_pivot", lambda *_: 2)
    assert llama_start.main(["--small", "--device", "cpu"]) == 1
