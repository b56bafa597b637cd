"""Weights of any size: the same factors times a power of two, or an error that names them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pivot_matrices import gaussian
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels.linalg import (
    cpu_core,
    effective_rank,
    kron_factors,
    pivoted_qr,
    rank_profile,
    rebuild_pivoted_qr,
    truncated_svd,
)

# Powers of two that take a Gaussian matrix near both ends of what its dtype holds.
FAR = [
    (dtype, exponent)
    for dtype, ends in {
        torch.bfloat16: (-100, 110),
        torch.float32: (-100, 50, 110),
        torch.float64: (-960, -600, 600, 1000),
    }.items()
    for exponent in ends
]
far = pytest.mark.parametrize(("dtype", "exponent"), FAR, ids=str)
Pair = tuple[Tensor, Tensor]


def pair(dtype: torch.dtype, exponent: int, shape: tuple[int, int] = (48, 36)) -> Pair:
    """A Gaussian matrix and its multiple by 2^exponent, which is exact."""
    weight = gaussian(*shape).to(dtype)
    return weight, times(weight, exponent)


def times(tensor: Tensor, exponent: int) -> Tensor:
    half = exponent // 2
    return tensor * 2.0**half * 2.0 ** (exponent - half)


# --- a power of two in, the same power of two out


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "options", [{"rank": 7}, {"tau": 0.4}, {"tau": 0.7, "rank_rule": "energy"}]
)
@far
def test_pivoted_qr(
    dtype: torch.dtype,
    exponent: int,
    options: dict[str, Any],
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not native:
        monkeypatch.setattr(cpu_core, "handles", lambda _: False)
    near, there = (pivoted_qr(w, **options) for w in pair(dtype, exponent))
    assert there.rank == near.rank
    assert torch.equal(there.pivots, near.pivots)
    assert torch.equal(there.q, near.q)
    assert torch.equal(there.r, times(near.r, exponent))
    assert torch.equal(there.diagonal, times(near.diagonal, exponent))


@far
def test_rebuild_pivoted_qr(dtype: torch.dtype, exponent: int) -> None:
    _, weight = pair(dtype, exponent)
    first = pivoted_qr(weight, rank=5)
    again = rebuild_pivoted_qr(weight, first.pivots)
    for name in ("q", "r", "pivots", "diagonal"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.parametrize(
    ("shape", "options"),
    [((48, 36), {}), ((48, 36), {"which": "bottom"}), ((400, 300), {})],
    ids=["full", "bottom", "krylov"],
)
@far
def test_truncated_svd(
    dtype: torch.dtype, exponent: int, shape: tuple[int, int], options: dict[str, Any]
) -> None:
    near, there = (truncated_svd(w, 4, **options) for w in pair(dtype, exponent, shape))
    assert torch.equal(there.u, near.u)
    assert torch.equal(there.vh, near.vh)
    assert torch.equal(there.s, times(near.s, exponent))


@pytest.mark.parametrize("start", ["qr", "svd", "random"])
@far
def test_kron_factors(dtype: torch.dtype, exponent: int, start: str) -> None:
    options: Any = {"start": start, "columns": "selected"}
    near, there = (kron_factors(w, **options) for w in pair(dtype, exponent))
    assert torch.equal(there.a0, times(near.a0, exponent))
    assert torch.equal(there.b0, times(near.b0, exponent))


@far
def test_effective_rank_and_profile(dtype: torch.dtype, exponent: int) -> None:
    near, there = pair(dtype, exponent)
    assert effective_rank(there) == pytest.approx(effective_rank(near), rel=1e-9)
    assert rank_profile(there).ranks == rank_profile(near).ranks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_smallest_numbers_of_a_dtype(dtype: torch.dtype) -> None:
    """Subnormal ones: a few bits each, all of which count."""
    exponent = {torch.float16: -24, torch.bfloat16: -133, torch.float32: -149}.get(dtype, -1074)
    least = 2.0**exponent
    near = torch.arange(48.0, dtype=torch.float64).reshape(8, 6) % 7
    weight = (near * least).to(dtype)
    found = pivoted_qr(weight, rank=3)
    assert torch.equal(found.pivots, pivoted_qr(near, rank=3).pivots)
    assert 0 < found.diagonal[0] <= 30 * least
    wide = torch.promote_types(dtype, torch.float32)
    singular = truncated_svd(weight, 1, out_dtype=wide).s.double()
    step = 2.0 ** (-1074 if wide == torch.float64 else -149)
    expected = torch.linalg.svdvals(near)[:1] * least
    torch.testing.assert_close(singular, expected, rtol=1e-6, atol=step)


# --- what a dtype cannot hold is said, and all else of the same weight works


def beyond() -> Tensor:
    """fp16 whose columns have norm 73,485 and whose σ is 1,469,694."""
    return torch.full((600, 400), 3000.0, dtype=torch.float16)


def test_fp16_with_column_norms_beyond_its_range() -> None:
    """Factors in fp32, unless fp16 is asked for."""
    [ordinary, found] = pivoted_qr([torch.eye(9).half(), beyond()], rank=1)
    again = rebuild_pivoted_qr(beyond(), torch.tensor([0]))
    assert ordinary.r.dtype == torch.float16
    for one in (found, again):
        assert (one.q.dtype, one.r.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close(one.q @ one.r, beyond().float(), rtol=1e-5, atol=0)
        assert one.diagonal.item() == pytest.approx(3000 * 600**0.5, rel=1e-6)
    wide = pivoted_qr(beyond(), rank=1, out_dtype=torch.float32)
    assert torch.equal(wide.r, found.r)
    assert rank_profile(beyond()).ranks["energy"][50] == 1
    with pytest.raises(ValueError, match=r"^weights must have a factor r that torch.float16 can"):
        pivoted_qr(beyond(), rank=1, out_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^weights\[1\] must have .* up to 7.348e\+04: ask for a"):
        pivoted_qr([torch.eye(9), beyond()], rank=1, out_dtype=torch.float16)
    with pytest.raises(ValueError, match="must have a factor r"):
        rebuild_pivoted_qr(beyond(), torch.tensor([0]), out_dtype=torch.float16)


@pytest.mark.parametrize("which", ["top", "middle"])
def test_fp16_with_singular_values_beyond_its_range(which: Any) -> None:
    weight = beyond()
    weight[:, ::2] *= -1
    weight[:300] *= 0.5
    rank = 1 if which == "top" else 400  # all of them
    u, s, vh = truncated_svd(weight, rank, which)
    assert (u.dtype, s.dtype, vh.dtype) == (torch.float16, torch.float32, torch.float16)
    want = 3000 * math.sqrt(400 * (300 + 300 / 4))
    assert s[0].item() == pytest.approx(want, rel=1e-6)
    for vector in (u[:, 0], vh[0]):
        assert vector.float().norm().item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_singular_values_of_half_precision_are_in_fp32(dtype: torch.dtype) -> None:
    weight = gaussian(30, 20).to(dtype)
    s = truncated_svd(weight, 3).s
    assert s.dtype == torch.float32
    torch.testing.assert_close(
        s.double(), torch.linalg.svdvals(weight.double())[:3], rtol=1e-5, atol=0
    )
    assert truncated_svd(weight.double(), 3, out_dtype=dtype).s.dtype == torch.float32
    assert truncated_svd(weight, 3, out_dtype=torch.float64).s.dtype == torch.float64


@pytest.mark.parametrize("value", [1e308, 1e-200], ids=["large", "small"])
def test_fp64_that_fp32_cannot_hold(value: float) -> None:
    weight = gaussian(24, 16) / 10 * value
    for start, factor in (
        (lambda w, **o: pivoted_qr(w, rank=3, **o), "r"),
        (lambda w, **o: truncated_svd(w, 3, **o), "s"),
        (lambda w, **o: kron_factors(w, rank=2, **o), "a0"),
    ):
        with pytest.raises(
            ValueError, match=rf"weights must have a factor {factor} that .*float32"
        ):
            start(weight, out_dtype=torch.float32)
        start(weight)


def test_the_largest_numbers_of_fp32_and_fp64() -> None:
    """Their norms are beyond the dtype: an error, and no "NaN or Inf"; wider factors are right."""
    for dtype in (torch.float32, torch.float64):
        weight = torch.full((9, 9), torch.finfo(dtype).max, dtype=dtype)
        for start in (lambda w: pivoted_qr(w, rank=1), lambda w: truncated_svd(w, 1)):
            with pytest.raises(ValueError, match=rf"that {dtype} can hold"):
                start(weight)
    weight = torch.full((9, 9), torch.finfo(torch.float32).max)
    largest = float(weight[0, 0])
    found = truncated_svd(weight, 1, out_dtype=torch.float64)
    assert found.s.item() == pytest.approx(9 * largest, rel=1e-6)
    assert pivoted_qr(weight, rank=1, out_dtype=torch.float64).diagonal.item() == pytest.approx(
        3 * largest, rel=1e-6
    )
    kron_factors(weight, start="kaiming")


# --- layers


def layer(weight: Tensor) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype))
    model[0].weight.data = weight
    return model


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"adapter": "qr", "rank": 1}, "r"),
        ({"adapter": "lora_xs", "rank": 1}, "a"),
        ({"adapter": "lora_xs", "rank": 1, "sigma": "out"}, "b"),
    ],
    ids=str,
)
def test_a_layer_whose_factors_fp16_cannot_hold_is_named(
    options: dict[str, Any], factor: str
) -> None:
    model = layer(beyond() if factor != "b" else beyond().T)
    with pytest.raises(ValueError, match=rf"^0\.weight must have a factor {factor} that .*float16"):
        qk.adapt(model, ["0"], progress=False, **options)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("sigma", ["none", "split"])
def test_a_layer_whose_factors_fp16_holds_starts(sigma: str) -> None:
    adapted = qk.adapt(
        layer(beyond()), ["0"], adapter="lora_xs", rank=1, sigma=sigma, progress=False
    )[0]
    scale = 1.0 if sigma == "none" else math.sqrt(3000 * math.sqrt(240000))
    assert adapted.a.float().norm().item() == pytest.approx(scale, rel=1e-2)
    assert adapted.b.float().norm().item() == pytest.approx(scale, rel=1e-2)


ADAPTERS: list[dict[str, Any]] = [
    {"adapter": "qr", "rank": 4},
    {"adapter": "lora_xs", "rank": 4},
    {"adapter": "lora_xs", "rank": 4, "basis": "random"},
    {"adapter": "lora_xs", "rank": 4, "basis": "random_svd"},
    {"adapter": "ohora", "columns": "selected"},
    {"adapter": "ohora", "start": "kaiming"},
]
SCALED = {"qr": ("r",), "lora_xs": ("a",), "ohora": ("a0", "b0")}


@pytest.mark.parametrize("options", ADAPTERS, ids=str)
@far
def test_layers_start_from_weights_of_any_size(
    dtype: torch.dtype, exponent: int, options: dict[str, Any]
) -> None:
    near, there = (
        qk.adapt(layer(w), ["0"], progress=False, **options)[0] for w in pair(dtype, exponent)
    )
    free = options.get("basis") == "random" or options.get("start") == "kaiming"
    for name in SCALED[options["adapter"]]:
        found, expected = getattr(there, name), times(getattr(near, name), 0 if free else exponent)
        # A random matrix far out of fp32's range is drawn in fp32 and taken apart in fp64.
        error = (found - expected).abs().max() / expected.abs().max()
        assert error <= (1e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("options", ADAPTERS[:2], ids=str)
@far
def test_the_share_of_a_weight_of_any_size_that_a_basis_keeps(
    dtype: torch.dtype, exponent: int, options: dict[str, Any]
) -> None:
    near, there = (
        qk.adapt(layer(w), ["0"], progress=False, **options)[0].energy_kept()
        for w in pair(dtype, exponent)
    )
    assert there == pytest.approx(near, rel=1e-6)


@pytest.mark.parametrize("exponent", [0, -600, 600])
def test_a_rebuilt_diagonal_is_compared_at_its_own_size(exponent: int) -> None:
    """All diagonals of small weights are close to each other in absolute terms."""
    adapted = qk.QRLinear.from_linear(layer(pair(torch.float64, exponent)[1])[0], rank=4)
    small = {"pivots": adapted.pivots, "diagonal": adapted.diagonal}
    rebuilt = qk.QRLinear.adapter.rebuild(adapted.weight, adapted.options, small)
    assert torch.equal(rebuilt["r"], adapted.r)
    small["diagonal"] = adapted.diagonal * 1.001
    with pytest.raises(ValueError, match="do not give the stored diagonal"):
        qk.QRLinear.adapter.rebuild(adapted.weight, adapted.options, small)


@pytest.mark.parametrize("exponent", [-140, -100, -40, 100])
def test_a_gradient_of_any_size_gives_the_same_basis(exponent: int) -> None:
    """Squares of small gradients vanish, and they passed for zero; only directions count."""
    factors = []
    gradient = torch.sign(gaussian(48, 36)).float()  # a single bit, so that 2^-140 loses none
    for e in (0, exponent):
        model = layer(gaussian(48, 36, 1).float())
        model[0].weight.grad = times(gradient, e)
        adapted = qk.adapt(
            model, ["0"], adapter="lora_xs", rank=4, basis="gradient", progress=False
        )[0]
        factors.append((adapted.a, adapted.b))
    (a, b), (other_a, other_b) = factors
    assert torch.equal(a, other_a)
    assert torch.equal(b, other_b)
