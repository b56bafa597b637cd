"""The helpers reject planted faults: without this, a green suite would prove nothing."""

from __future__ import annotations

import error_bound
import helpers
import pytest
import torch

LARGE = (199, 736, 480, 16)


def _large(op, dtype=torch.float32, shape=LARGE, change=None):
    """Operands, an incoming gradient and the results of the package's own choice of backend."""
    given = helpers.operands(op, *shape, dtype, change=change)
    dy = helpers.gradient_like(op, given)
    return given, dy, helpers.outcome(helpers.call, op, given, dy)


def _rejected(op, given, dy, name, wrong):
    with pytest.raises(AssertionError, match=f"^{name}: "):
        helpers.assert_error_bound(op, given, dy, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", helpers.OPS)
def test_error_bound_rejects_one_wrong_element_of_each_tensor(op, dtype):
    given, dy, got = _large(op, dtype)
    helpers.assert_error_bound(op, given, dy, got)
    for name, tensor in got.items():
        wrong = {n: t.clone() for n, t in got.items()}
        # bf16 stores h and S: a gradient that sums them up may be off by most of a typical element.
        fault = 1.0 if dtype == torch.bfloat16 else 0.05
        wrong[name].view(-1)[-1] += fault * tensor.double().square().mean().sqrt()
        _rejected(op, given, dy, name, wrong)


@pytest.mark.parametrize("op", helpers.OPS)
def test_error_bound_rejects_a_dropped_term_of_the_base(op):
    """The last of K products is missing in y, of N products in dx, of M in the bias' gradient."""
    given, dy, got = _large(op)
    x, weight = given["x"], given["weight"]
    lost = {
        "y": got["y"] - x[:, -1:] * weight[:, -1],
        "x": got["x"] - dy[:, -1:] * weight[-1],
        "bias": got["bias"] - dy[-1],
    }
    for name, wrong in lost.items():
        _rejected(op, given, dy, name, got | {name: wrong})


@pytest.mark.parametrize("op", ["qr_linear", "lora_xs_linear"])
def test_error_bound_rejects_a_dropped_term_of_the_update(op):
    """One direction of r is missing in y and dx, one token of M in the gate's gradient."""
    given, dy, got = _large(op)
    gate = helpers.TRAINABLES[op][0]
    fewer = given | {gate: given[gate].clone()}
    fewer[gate][..., -1] = 0
    without = helpers.outcome(helpers.call, op, fewer, dy)
    for name in ("y", "x"):
        _rejected(op, given, dy, name, got | {name: without[name]})
    last = {n: given[n] for n in given} | {"x": given["x"][:-1]}
    shorter = helpers.outcome(helpers.call, op, last, dy[:-1])
    _rejected(op, given, dy, gate, got | {gate: shorter[gate]})


def test_error_bound_rejects_a_dropped_token_of_the_kronecker_gradients():
    given, dy, got = _large("kron_linear")
    shorter = helpers.outcome(helpers.call, "kron_linear", given | {"x": given["x"][:-1]}, dy[:-1])
    for name in ("a", "b"):
        _rejected("kron_linear", given, dy, name, got | {name: shorter[name]})


@pytest.mark.parametrize("dtype", helpers.HALF, ids=str)
@pytest.mark.parametrize("op", helpers.OPS)
def test_error_bound_rejects_a_sum_kept_in_half_precision(op, dtype):
    """y summed up in 64 terms at a time, every partial sum rounded to the operands' dtype."""
    given, dy, got = _large(op, dtype, (64, 32, 2048, 16), change=1e-2)
    x, weight = given["x"], given["weight"]
    careless = sum(x[:, i : i + 64] @ weight[:, i : i + 64].T for i in range(0, 2048, 64))
    update = helpers.exact(op, given) - x.double() @ weight.double().T
    _rejected(op, given, dy, "y", got | {"y": (careless + update.to(dtype)).to(dtype)})


@pytest.mark.parametrize("dtype", helpers.HALF, ids=str)
@pytest.mark.parametrize("op", helpers.OPS)
def test_error_bound_rejects_a_rounding_too_many(op, dtype):
    """The base product is rounded before the update or the bias is added to it."""
    given, dy, got = _large(op, dtype, (199, 96, 480, 16), change=1e-2)
    base = given["x"].double() @ given["weight"].double().T
    rest = helpers.exact(op, given) - base
    _rejected(op, given, dy, "y", got | {"y": (base.to(dtype).double() + rest).to(dtype)})
    twice = dy.double() @ given["weight"].double()
    rest = helpers.in_fp64(op, given, dy)["x"] - twice
    if op != "linear_add":  # its dx is the base product alone
        twice = (twice.to(dtype).double() + rest).to(dtype)
        _rejected(op, given, dy, "x", got | {"x": twice})


@pytest.mark.parametrize("op", ["qr_linear", "lora_xs_linear"])
def test_error_bound_rejects_h_in_bf16_among_fp32(op):
    given, dy, got = _large(op)
    down = given["r" if op == "qr_linear" else "a"]
    h = torch.nn.functional.linear(given["x"], down)
    lost = (h.bfloat16().double() - h.double()) @ (
        helpers.delta_weight(op, given) @ torch.linalg.pinv(down.double())
    ).T
    _rejected(op, given, dy, "y", got | {"y": got["y"] + lost.float()})


def test_error_bound_rejects_nan_and_wrong_shape():
    truth = {"y": torch.ones(3, dtype=torch.float64)}
    for wrong in (torch.tensor([1.0, float("nan"), 1.0]), torch.ones(3, 1)):
        with pytest.raises(AssertionError, match=r"^y: "):
            error_bound.assert_within_bound({"y": wrong}, truth, {"y": torch.ones(3)})


def test_growth_is_the_smaller_of_the_two_bounds():
    unit = 2.0**-24
    assert error_bound.growth(0, unit) == 0
    assert error_bound.growth(10, unit) == pytest.approx(10 * unit, rel=1e-5)
    assert error_bound.growth(10_000, unit) == pytest.approx(8 * 100 * unit, rel=1e-3)


@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_half_an_ulp_is_the_rounding_of_the_type(dtype):
    values = torch.tensor([1.0, 1.5, 1.9, 3.0, 1000.0, 0.1, 0.0], dtype=torch.float64).to(dtype)
    above = torch.nextafter(values, torch.full_like(values, torch.inf))
    want = (above.double() - values.double()) / 2
    assert torch.equal(error_bound.half_ulp(values.double(), dtype), want)


@pytest.mark.parametrize("op", ["qr_linear", "lora_xs_linear", "kron_linear"])
def test_rms_rule_rejects_products_of_ten_bits_in_fp32(op):
    """Operands as a TF32 tensor core reads them: within the bound of long sums, not within rms."""
    got, eager, truth = helpers.pooled(op, "reference", torch.float32, (33, 64, 96, 16), 32)
    error_bound.assert_no_worse_than_eager(got, eager, truth)
    for seed, result in enumerate(got):
        given = helpers.operands(op, 33, 64, 96, 16, bias=seed % 2 == 0, seed=seed)
        given["weight"] = (given["weight"].view(torch.int32) & ~0x1FFF).view(torch.float32)
        result["y"] = helpers.call(op, given)
    with pytest.raises(AssertionError, match=r"^y: rms"):
        error_bound.assert_no_worse_than_eager(got, eager, truth)


def test_rms_rule_rejects_three_times_eagers_error_and_too_few_numbers():
    got, eager, truth = helpers.pooled(
        "qr_linear", "reference", torch.float32, (33, 64, 96, 16), 32
    )
    for name in truth[0]:
        worse = [dict(draw) for draw in got]
        for draw, other, exact in zip(worse, eager, truth, strict=True):
            draw[name] = exact[name] + 3 * (other[name].double() - exact[name])
        with pytest.raises(AssertionError, match=f"^{name}: rms"):
            error_bound.assert_no_worse_than_eager(worse, eager, truth)
    with pytest.raises(AssertionError, match="lam: 496 numbers"):
        error_bound.assert_no_worse_than_eager(got[1:], eager[1:], truth[1:])


@pytest.mark.skipif(not helpers.EXTENDED, reason="long double is fp64 on this platform")
@pytest.mark.parametrize("op", helpers.OPS)
def test_the_truth_in_long_double_is_the_truth_in_fp64(op):
    given = helpers.operands(op, 7, 24, 36, 6, torch.float64)
    dy = helpers.gradient_like(op, given)
    want = helpers.in_fp64(op, given, dy)
    for name, exact in helpers.in_extended(op, given, dy).items():
        torch.testing.assert_close(exact, want[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", helpers.HALF)
def test_gain_shows_an_update_that_is_rounded_away(dtype):
    given = helpers.operands("qr_linear", 2048, 512, 256, 8, dtype, change=1e-4)
    update = given["x"].double() @ helpers.delta_weight("qr_linear", given).T
    base = torch.nn.functional.linear(given["x"], given["weight"], given["bias"])
    merged = (given["weight"].double() + helpers.delta_weight("qr_linear", given)).to(dtype)
    lost = torch.nn.functional.linear(given["x"], merged, given["bias"])
    assert helpers.update_gain(lost, base, update) < 0.9
    assert helpers.update_gain(base.double() + update, base, update) == pytest.approx(1.0)


def test_operands_have_the_wanted_change():
    for op in ("qr_linear", "lora_xs_linear", "kron_linear"):
        given = helpers.operands(op, 1, 64, 96, 4, torch.float64, change=1e-4)
        change = helpers.delta_weight(op, given).norm() / given["weight"].norm()
        assert 0.8e-4 < float(change) < 1.2e-4


def test_poison_reaches_fresh_memory_and_ends_with_the_block():
    with helpers.poisoned_memory():
        for fresh in (torch.empty(5), torch.ones(2).new_empty(3), torch.empty_like(torch.ones(4))):
            assert fresh.isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_same_bits_tells_zero_from_minus_zero():
    assert helpers.same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not helpers.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not helpers.same_bits(torch.ones(2), torch.ones(2, dtype=torch.float64))
