"""Starts of LoRA-XS and OHoRA: truncated SVD, Kronecker factors, effective rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pivot_matrices import gaussian
from torch import Tensor

from qrlora_kernels.linalg import (
    effective_rank,
    high_rank,
    kron_factors,
    krylov,
    ritz,
    truncated_svd,
)
from qrlora_kernels.linalg import svd as svd_module
from qrlora_kernels.linalg.parallel import SHARED_ELEMENTS


def decaying(rows: int, columns: int) -> Tensor:
    return gaussian(rows, columns) * torch.logspace(0, -3, columns, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["top", "middle", "bottom"])
@pytest.mark.parametrize("shape", [(300, 260), (90, 200), (200, 90)], ids=str)
def test_triplets(shape: tuple[int, int], which: str, dtype: torch.dtype) -> None:
    weight = decaying(*shape).to(dtype)
    u, s, vh = (t.double() for t in truncated_svd(weight, 6, which, out_dtype=torch.float64))
    values = torch.linalg.svdvals(weight.double())
    spare = len(values) - 6
    first = {"top": 0, "middle": spare // 2, "bottom": spare}[which]
    tolerance = 1e-9 if dtype == torch.float64 and which != "top" else 3e-6
    torch.testing.assert_close(
        s, values[first : first + 6], rtol=1e-5, atol=tolerance * float(values[0])
    )
    scale = 1e-3 if which == "top" else 1e-5
    assert (weight.double() @ vh.mT - u * s).norm(dim=0).max() <= scale * values[0]
    assert (weight.double().mT @ u - vh.mT * s).norm(dim=0).max() <= scale * values[0]
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(u.mT @ u, eye, rtol=0, atol=2e-5)
    torch.testing.assert_close(vh @ vh.mT, eye, rtol=0, atol=2e-5)
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


def test_krylov_is_taken_where_the_tail_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd_module, "_full", lambda *_: pytest.fail("took the full SVD"))
    truncated_svd(decaying(400, 400), 8)


def test_unresolved_tail_falls_back_to_the_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd_module, "_full", lambda *_: pytest.fail("took the full SVD"))
    weight = gaussian(500, 500)
    assert krylov.top_triplets(weight, 8, 0, 1e-13) is None
    u, s, vh = truncated_svd(weight, 8, tol=1e-13)
    assert (weight @ vh.mT - u * s).norm() < 1e-12 * s[0]


def test_an_unreachable_tolerance_ends_at_the_full_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    full = svd_module._full
    monkeypatch.setattr(svd_module, "_full", lambda *args: calls.append(1) or full(*args))
    weight = gaussian(200, 200)
    u, s, vh = truncated_svd(weight, 8, tol=1e-20)
    assert calls == [1]
    assert (weight @ vh.mT - u * s).norm() < 1e-12 * s[0]


def test_rank_that_costs_a_full_svd_takes_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krylov._Basis, "grow", lambda *_: pytest.fail("started a Krylov basis"))
    for shape, rank in (((300, 400), 40), ((1100, 1000), 160)):
        assert krylov.top_triplets(gaussian(*shape), rank, 0, 1e-3) is None


def test_an_eigenproblem_comes_first_where_it_is_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, rank in (((300, 400), 10), ((1100, 1000), 84), ((384, 1536), 8)):
        assert not krylov.is_ahead(gaussian(*shape), rank)
    assert krylov.is_ahead(gaussian(1100, 1000), 64)
    assert krylov.is_ahead(decaying(300, 400), 10)
    taken = []
    krylov_way = svd_module.top_triplets
    monkeypatch.setattr(svd_module, "top_triplets", lambda *a: taken.append(1) or krylov_way(*a))
    monkeypatch.setattr(svd_module, "_full", lambda *_: pytest.fail("took the full SVD"))
    truncated_svd(gaussian(384, 384), 16)
    assert not taken
    steep = decaying(384, 384) * torch.logspace(0, -3, 384, dtype=torch.float64)
    truncated_svd(steep, 16)  # whose squares the Gram matrix would lose
    assert taken == [1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(260, 400), (400, 260), (300, 300)], ids=str)
def test_triplets_of_the_gram_matrix_are_the_full_svds(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = gaussian(*shape).to(dtype)
    rank = min(shape) // 2
    full = svd_module._full(weight.double(), rank, "top")
    monkeypatch.setattr(svd_module, "_full", lambda *_: pytest.fail("took the full SVD"))
    u, s, vh = truncated_svd(weight, rank)
    rounding = 1e3 * torch.finfo(dtype).eps
    torch.testing.assert_close(s.double(), full.s, rtol=rounding, atol=0)
    # Where a gap is narrow single vectors turn: the spaces are compared, weighted by σ.
    torch.testing.assert_close(
        (u * s).double() @ vh.double(),
        (full.u * full.s) @ full.vh,
        rtol=0,
        atol=rounding * float(full.s[0]),
    )
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_lower_rank_is_the_beginning_of_a_higher_one() -> None:
    """An adapter is resized where the factors begin with those that it has."""
    weight = gaussian(300, 280).float()
    high = ritz.dense_triplets(weight, 140, 1e-3)
    for rank in (20, 32, 77):
        low = ritz.dense_triplets(weight, rank, 1e-3)
        assert torch.equal(low[0], high[0][:, :rank])
        assert torch.equal(low[1], high[1][:rank])
        assert torch.equal(low[2], high[2][:rank])


@pytest.mark.parametrize("rank", [3, 130])
def test_what_the_squares_lose_is_taken_from_the_full_svd(rank: int) -> None:
    """σ_i = 1e-5 σ_1 at half of them: its square is far under a Gram matrix's rounding in fp32."""
    left, right = (torch.linalg.qr(gaussian(300, 300, seed)).Q for seed in (1, 2))
    values = 10.0 ** torch.linspace(0, -10, 300, dtype=torch.float64)
    weight = ((left * values) @ right.mT).float()
    assert ritz.dense_triplets(weight, rank, 1e-3) is None
    _, s, _ = truncated_svd(weight, 130)
    torch.testing.assert_close(s.double(), values[:130], rtol=0, atol=2e-6)


def _rows_only(count: int) -> Tensor:
    weight = torch.zeros(400, 400)
    weight[:count] = gaussian(count, 400).float()
    return weight


@pytest.mark.parametrize("rank", [12, 100])
@pytest.mark.parametrize(
    "weight",
    [
        _rows_only(4),
        _rows_only(20),
        torch.diag(torch.tensor([3.0, 2.0, 1.0] + [0.0] * 397)),
        torch.zeros(400, 400),
        gaussian(400, 400).float() * 1e19,  # squares overflow
        gaussian(400, 400).float() * 1e-22,  # squares vanish
    ],
    ids=["4 rows", "20 rows", "diagonal", "zero", "large", "small"],
)
def test_svd_of_a_space_that_ends_early(weight: Tensor, rank: int) -> None:
    """A Krylov space ends with the matrix's rank; what would follow is rounding."""
    u, s, vh = truncated_svd(weight, rank)
    want = torch.linalg.svdvals(weight.double())[:rank]
    torch.testing.assert_close(s.double(), want, rtol=1e-4, atol=1e-6 * float(want[0]))
    for basis in (u, vh.mT):
        assert (basis.mT @ basis - torch.eye(rank)).abs().max() < 1e-4


def test_repeated_singular_values_are_all_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64 the blocks of 16 give 32 copies of the value, none with a residual; probes find 8."""
    monkeypatch.setattr(svd_module, "_full", lambda *_: pytest.fail("took the full SVD"))
    left, right = (torch.linalg.qr(gaussian(640, 640, seed)).Q for seed in (1, 2))
    values = torch.maximum(
        2 * 0.9 ** torch.arange(-40, 600, dtype=torch.float64),
        torch.linspace(0.2, 0.1, 640, dtype=torch.float64),
    )
    values[:40] = 3.0
    _, s, _ = truncated_svd((left * values) @ right.mT, 40)
    torch.testing.assert_close(s, values[:40])


@pytest.mark.parametrize("shape", [(384, 384), (1536, 384), (384, 1536)], ids=str)
def test_spectrum_of_a_trained_layer(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """σ_i falling as i^-0.3, about as in a MiniLM encoder."""
    monkeypatch.setattr(svd_module, "_full", lambda *_: pytest.fail("took the full SVD"))
    side = min(shape)
    left = torch.linalg.qr(gaussian(shape[0], side, 1)).Q
    right = torch.linalg.qr(gaussian(shape[1], side, 2)).Q
    values = torch.arange(1, side + 1, dtype=torch.float64) ** -0.3
    u, s, vh = truncated_svd(((left * values) @ right.mT).float(), 16)
    torch.testing.assert_close(s.double(), values[:16], rtol=1e-4, atol=0)
    overlap = (u.double() * left[:, :16]).sum(0).abs() * (vh.double().mT * right[:, :16]).sum(
        0
    ).abs()
    assert overlap.min() > 0.999


def test_svd_is_repeatable_and_leaves_the_random_state_alone() -> None:
    weights = [decaying(220, 200).float(), decaying(64, 80).bfloat16(), gaussian(420, 400)]
    before = torch.get_rng_state()
    together, again = truncated_svd(weights, 4), truncated_svd(weights, 4)
    alone = [truncated_svd(weight, 4) for weight in weights]
    assert torch.equal(before, torch.get_rng_state())
    for results in (again, alone):
        for one, two in zip(together, results, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize(
    "start", [lambda w: truncated_svd(w, 5), kron_factors], ids=["svd", "kron"]
)
def test_bits_of_small_matrices_do_not_depend_on_the_number_of_threads(
    start: Callable[[list[Tensor]], list[tuple[Tensor, ...]]],
) -> None:
    weights = [gaussian(576, 512, seed).float() for seed in range(3)]
    assert weights[0].numel() < SHARED_ELEMENTS
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(start(weights))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_error_names_the_matrix_whichever_thread_has_it() -> None:
    weights = [gaussian(48, 36, seed) for seed in range(4)]
    weights[2][0, 0] = torch.nan
    for start in (lambda w: truncated_svd(w, 3), kron_factors):
        with pytest.raises(ValueError, match=r"weights\[2\] must be finite"):
            start(weights)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((768, 768), 24), ((768, 3072), 24), ((4096, 14336), 64), ((1024, 4096), 32), ((7, 11), 1)],
)
def test_high_rank(shape: tuple[int, int], rank: int) -> None:
    assert high_rank(*shape) == rank


@pytest.mark.parametrize("columns", ["leading", "selected"])
@pytest.mark.parametrize("start", ["qr", "svd"])
@pytest.mark.parametrize("shape", [(48, 36), (36, 144)], ids=str)
def test_kron_factors_are_the_papers(shape: tuple[int, int], start: str, columns: str) -> None:
    weight, r = gaussian(*shape), 6
    if start == "qr":
        left, right = torch.linalg.qr(weight)
        order = right.diagonal().abs().argsort(descending=True)
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        left, right, order = u, s[:, None] * vh, torch.arange(len(s))
    i1, i2 = order[:r], order[r : 2 * r]
    n, k = shape

    def expected(rows: int, chosen: Tensor) -> Tensor:
        if columns == "leading":
            return left[:rows][:, chosen] @ right[chosen][:, :r]
        return left[:rows][:, chosen] @ right[chosen][:, chosen]

    a0, b0 = kron_factors(weight, rank=r, columns=columns, start=start)
    assert (a0.shape, b0.shape) == ((n // r, r), (k // r, r))
    if columns == "leading" or start == "qr":  # products in which the signs of the SVD cancel
        torch.testing.assert_close(a0, expected(n // r, i1))
        torch.testing.assert_close(b0, expected(k // r, i2))


@pytest.mark.parametrize("start", ["random", "kaiming"])
def test_random_starts_are_seeded(start: str) -> None:
    weight = gaussian(144, 144).float()
    before = torch.get_rng_state()
    one = kron_factors(weight, columns="selected", start=start, seed=3)
    two = kron_factors([weight], columns="selected", start=start, seed=3)[0]
    other = kron_factors(weight, columns="selected", start=start, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.a0, two.a0)
    assert torch.equal(one.b0, two.b0)
    assert not torch.equal(one.a0, other.a0)
    if start == "kaiming":
        assert one.a0.abs().max() <= 12**-0.5


@pytest.mark.parametrize(
    ("match", "shape", "options"),
    [
        ("rank must divide", (48, 36), {"rank": 5}),
        ("r_high = 6", (48, 36), {"rank": 12}),
        ("diagonal entries", (1, 5), {}),
        ("K/r = 50 rows", (4, 100), {"rank": 2}),
        ("columns must be one of", (48, 36), {"columns": "all"}),
        ("start must be one of", (48, 36), {"start": "zeros"}),
    ],
)
def test_kron_errors(match: str, shape: tuple[int, int], options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=match):
        kron_factors(gaussian(*shape), **options)  # type: ignore[call-overload]


def test_a_start_that_cannot_train_is_refused() -> None:
    weight = gaussian(48, 36)
    weight[:, :6] = 0  # R is zero in its first r columns
    with pytest.raises(ValueError, match="other than zero"):
        kron_factors(weight, rank=6)


def test_cut_is_refused_where_nothing_is_cut() -> None:
    with pytest.raises(ValueError, match="cut must be True for start='kaiming'"):
        kron_factors(gaussian(64, 64), rank=4, start="kaiming", cut=False)


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(17)) == pytest.approx(17)
    assert effective_rank(gaussian(20, 1) @ gaussian(1, 30)) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 3)) == 0
    # Two equal values among zeros: entropy log 2.
    assert effective_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0]))) == pytest.approx(2)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"rank": 31}, {"rank": 3, "which": "left"}], ids=str)
def test_svd_errors(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"rank|which"):
        truncated_svd(gaussian(40, 30), **bad)  # type: ignore[call-overload]
