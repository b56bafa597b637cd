"""The helpers reject planted faults: without this, a green suite would prove nothing."""

from __future__ import annotations

import helpers
import pytest
import torch


def _three_results(op, dtype):
    given = helpers.operands(op, 64, 32, 48, 4, dtype)
    dy = helpers.gradient_like(op, given)
    wide = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    truth = helpers.outcome(helpers.exact, op, wide, dy)
    eager = helpers.outcome(helpers.plain, op, given, dy)
    got = helpers.outcome(helpers.call, op, given, dy)
    return got, eager, truth


@pytest.mark.parametrize("op", helpers.OPS)
def test_error_rule_rejects_a_wrong_element_of_each_tensor(op):
    got, eager, truth = _three_results(op, torch.bfloat16)
    helpers.assert_error_rule(got, eager, truth, torch.bfloat16)
    for name in truth:
        wrong = {n: t.clone() for n, t in got.items()}
        wrong[name].view(-1)[-1] += 0.1 * truth[name].abs().max()
        with pytest.raises(AssertionError, match=name):
            helpers.assert_error_rule(wrong, eager, truth, torch.bfloat16)


def test_error_rule_rejects_a_sum_in_half_precision():
    torch.manual_seed(0)
    x, w = torch.randn(64, 4096).bfloat16(), torch.randn(32, 4096).bfloat16()
    truth = {"y": x.double() @ w.double().T}
    eager = {"y": x @ w.T}
    careless = {"y": sum(x[:, i : i + 64] @ w[:, i : i + 64].T for i in range(0, 4096, 64))}
    with pytest.raises(AssertionError, match="y: "):
        helpers.assert_error_rule(careless, eager, truth, torch.bfloat16)


def test_error_rule_rejects_nan_and_wrong_shape():
    truth = {"y": torch.ones(3, dtype=torch.float64)}
    for wrong in (torch.tensor([1.0, float("nan"), 1.0]), torch.ones(3, 1)):
        with pytest.raises(AssertionError):
            helpers.assert_error_rule({"y": wrong}, {"y": torch.ones(3)}, truth, torch.float32)


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
