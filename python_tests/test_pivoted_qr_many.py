"""Many pivots: the search that keeps the residual matrix and has the factors for nothing."""

from __future__ import annotations

import pytest
import torch
from pivot_matrices import assert_greedy, gaussian, matrices
from torch import Tensor

from qrlora_kernels.linalg import PivotedQR, cpu_core, pivoted_qr, rebuild_pivoted_qr


@pytest.fixture(autouse=True)
def _native() -> None:
    if cpu_core.CORE is None:
        pytest.fail("the native core is not built, so its pivots cannot be tested")


def boundary(weight: Tensor) -> int:
    """The largest rank of the search that reads the matrix in passes."""
    ranks = range(1, min(weight.shape))
    return max(rank for rank in ranks if not cpu_core.keeps_residual(weight, rank))


def assert_factors(found: PivotedQR, weight: Tensor) -> None:
    q, r, wide = found.q.double(), found.r.double(), weight.double()
    half = weight.dtype in (torch.bfloat16, torch.float16)
    unit = {torch.float64: 1e-13, torch.float32: 2e-6}.get(weight.dtype, 0.02)
    orthogonal = {torch.float64: 1e-12, torch.float32: 1e-5}.get(weight.dtype, 0.02)
    assert (q.mT @ q - torch.eye(found.rank, dtype=q.dtype)).abs().max() <= orthogonal
    scale = wide.norm(dim=0)
    assert ((q.mT @ wide - r).abs() <= unit * scale + 1e-300).all()
    at_pivots = found.r[:, found.pivots]
    assert torch.equal(at_pivots, at_pivots.triu())
    assert torch.equal(at_pivots.diagonal(), found.diagonal.to(weight.dtype))
    assert (found.diagonal > 0).all()
    if found.rank == min(weight.shape) and not half:
        assert ((q @ r - wide).norm(dim=0) <= 10 * unit * scale + 1e-300).all()


def same_bits(one: PivotedQR, two: PivotedQR) -> bool:
    names = ("q", "r", "pivots", "diagonal")
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(matrices()))
def test_pivots_and_factors_on_both_sides_of_the_boundary(name: str, dtype: torch.dtype) -> None:
    weight = matrices()[name].to(dtype)
    before = weight.clone()
    last = boundary(weight)
    for rank in (last, last + 1, (last + min(weight.shape)) // 2, min(weight.shape)):
        found = pivoted_qr(weight, rank=rank)
        assert torch.equal(weight, before)
        assert found.rank == rank or found.deficient
        assert_greedy(found.pivots, weight)
        assert_factors(found, weight)


@pytest.mark.parametrize(
    "name",
    ["gaussian", "heavy_tailed", "geometric_spectrum", "nearer_duplicates", "twelve_decades"],
)
def test_candidates_stay_over_many_blocks(name: str) -> None:
    """In passes over the matrix: residuals that are lowered block by block choose as fresh ones."""
    weight = matrices(700)[name]
    rank = boundary(weight)
    found = pivoted_qr(weight, rank=rank)
    assert found.rank == rank
    assert_greedy(found.pivots, weight)
    assert_factors(found, weight)


@pytest.mark.parametrize("shape", [(30, 90), (90, 30), (65, 65), (129, 200), (3, 2), (1, 4)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape).float()
    found = pivoted_qr(weight.mT.contiguous().mT)
    assert_greedy(found.pivots, weight)
    assert_factors(found, weight)
    assert same_bits(found, pivoted_qr(weight))


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 120}, {"tau": 0.3}, {"tau": 0.9, "rank_rule": "energy"}, {"max_rank": 130}],
    ids=str,
)
@pytest.mark.parametrize("name", ["gaussian", "heavy_tailed", "rank_100"])
def test_rebuild_has_the_same_bits(name: str, options: dict[str, object]) -> None:
    weight = matrices()[name].float()
    found = pivoted_qr(weight, **options)  # type: ignore[call-overload]
    assert same_bits(found, rebuild_pivoted_qr(weight, found.pivots))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [10, 19, 39, 41])
def test_rebuild_of_a_matrix_that_ends_early(rank: int, dtype: torch.dtype) -> None:
    """The limit asks for many pivots, the matrix has few: both make factors from what was found."""
    weight = gaussian(200, 200).to(dtype)
    weight[rank:] = 0
    found = pivoted_qr(weight, rank=60)
    assert found.rank == rank
    assert found.deficient
    assert same_bits(found, rebuild_pivoted_qr(weight, found.pivots))


def test_rebuild_takes_pivots_that_are_not_the_greedy_ones() -> None:
    weight = gaussian(60, 60)
    pivots = torch.arange(59, -1, -1)
    found = rebuild_pivoted_qr(weight, pivots)
    assert torch.equal(found.pivots, pivots)
    assert_factors(found, weight)


def test_bits_do_not_depend_on_threads_or_on_the_list() -> None:
    weights = [gaussian(200, 260).float(), gaussian(96, 64, 1), gaussian(300, 200, 2).bfloat16()]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += [pivoted_qr(weights), [pivoted_qr(weight) for weight in weights]]
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(same_bits(one, two) for one, two in zip(results[0], other, strict=True))


def test_few_and_many_pivots_in_one_list() -> None:
    weights = [gaussian(400, 390), gaussian(60, 50, 1), gaussian(400, 390, 2)]
    done = pivoted_qr(weights, rank=45, progress=True)
    assert [cpu_core.keeps_residual(weight, 45) for weight in weights] == [False, True, False]
    for found, weight in zip(done, weights, strict=True):
        assert same_bits(found, pivoted_qr(weight, rank=45))
        assert_greedy(found.pivots, weight)


def test_errors_name_the_matrix() -> None:
    bad = gaussian(50, 50)
    bad[3, 3] = torch.inf
    with pytest.raises(ValueError, match=r"weights\[1\] must be finite"):
        pivoted_qr([gaussian(50, 50), bad])
    with pytest.raises(ValueError, match=r"weights\[1\] must not be zero"):
        pivoted_qr([gaussian(50, 50), torch.zeros(50, 50)])
