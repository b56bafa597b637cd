"""QR-LoRA with factors="output": h is made of the base product, and Q alone is kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import error_bound
import helpers
import pytest
import torch
import torch.nn.functional as F
from output_factors import KEPT, WIDE, close, pair, trained_by
from saved import base, moved, x
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels import functional

# --- the model


@WIDE
def test_it_is_the_adapter_of_two_factors_up_to_rounding(dtype):
    both, output = (trained_by(model, x(dtype)) for model in pair(dtype))
    for name, tensor in both.items():
        close(output[name], tensor, dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(256, 256, 32), (96, 384, 40), (300, 100, 64)], ids=str)
def test_no_worse_than_the_plain_expression_of_two_factors(shape, threads):
    """y, dx and dλ of starts from pivoted QR, each against its own tensors in fp64 (contract 1)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        draws = [_errors(*shape, seed) for seed in range(16)]
    finally:
        torch.set_num_threads(before)
    got, eager, zero = (
        [{name: found[name][i] for name in found} for found in draws] for i in range(3)
    )
    error_bound.assert_no_worse_than_eager(got, eager, zero)


def _errors(n: int, k: int, r: int, seed: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of y, dx and dλ: the exact result with the error of the layer, with eager's, without."""
    torch.manual_seed(seed)
    linear, rows, dy = nn.Linear(k, n), torch.randn(60, k), torch.randn(60, n)
    layer = qk.QRLinear.from_linear(linear, rank=r, factors="output")
    lam = torch.randn(r) / 2
    with torch.no_grad():
        layer.lam.copy_(lam)
    other = qk.QRLinear.from_linear(linear, rank=r)
    q, down, weight = layer.q.double(), other.r, layer.weight

    def plain(rows: Tensor, lam: Tensor, r: Tensor) -> Tensor:
        wide = (t.to(rows.dtype) for t in (weight, layer.bias, other.q, r))
        weight_, bias, q, r = wide
        return F.linear(rows, weight_, bias) + F.linear(F.linear(rows, r) * lam, q)

    def results(y: Tensor, leaves: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        dx, dlam = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        return {"y": y.detach().double(), "dx": dx.double(), "dlam": dlam.double()}

    def by_plain(dtype: torch.dtype, r: Tensor) -> dict[str, Tensor]:
        leaves = rows.to(dtype).requires_grad_(), lam.to(dtype).requires_grad_()
        return results(plain(*leaves, r), leaves)

    leaf = rows.clone().requires_grad_()
    got = results(layer(leaf), (leaf, layer.lam))
    own = by_plain(torch.float64, q.mT @ weight.double())
    eager, exact = by_plain(torch.float32, down), by_plain(torch.float64, down)
    return {name: (exact[name] + got[name] - own[name], eager[name], exact[name]) for name in exact}


@WIDE
def test_without_a_bias_the_start_answers_with_the_bits_of_the_base_product(dtype):
    linear = nn.Linear(384, 200, bias=False, dtype=dtype)
    rows = torch.randn(40, 384, dtype=dtype)
    layer = qk.QRLinear.from_linear(linear, rank=8, factors="output")
    assert helpers.same_bits(layer(rows), linear(rows))


def test_a_bias_has_no_part_in_h():
    one, rows = nn.Linear(16, 24).double(), x(torch.float64)
    layer = qk.QRLinear.from_linear(one, rank=4, factors="output")
    with torch.no_grad():
        layer.lam.fill_(0.5)
        one.bias.add_(1e3)  # it is the layer's
        want = rows @ (one.weight + layer.delta_weight()).mT
        torch.testing.assert_close(layer(rows) - one.bias, want, rtol=0, atol=1e-11)


# --- what is kept, and what is told of it


def test_half_the_factors_are_kept_and_told():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(64, 64)) for _ in range(2)]
    both, output = (
        qk.adapt(net, ["0"], rank=16, factors=factors, progress=False)
        for net, factors in zip(nets, ("both", "output"), strict=True)
    )
    assert output[0].r is None
    assert {n for n, v in vars(output[0]).items() if isinstance(v, Tensor)} == set(KEPT)
    assert set(output.state_dict()) == {f"0.{n}" for n in ("weight", "bias", "lam", *KEPT)}
    matrix = 64 * 16 * 4
    rows = [qk.summary(model, show=False).layers[0] for model in (both, output)]
    assert rows[0].factor_bytes - rows[1].factor_bytes == matrix
    assert rows[1].factor_bytes == matrix + 16 * (8 + 8)  # pivots and |R_ii|


def test_a_rank_rule_warns_by_what_is_kept():
    torch.manual_seed(0)
    layers = {factors: nn.Linear(64, 64) for factors in ("both", "output")}
    with pytest.warns(UserWarning, match="take 9.% of the memory"):
        qk.adapt(nn.Sequential(layers["both"]), ["0"], tau=0.6, max_rank=30, progress=False)
    with pytest.warns(UserWarning, match="take 47% of the memory"):
        qk.adapt(
            nn.Sequential(layers["output"]), ["0"], tau=0.6, max_rank=30,
            factors="output", progress=False,
        )  # fmt: skip


def test_the_update_and_its_factors_are_of_the_weight():
    both, output = pair()
    for one, other in zip((both[0], both[2]), (output[0], output[2]), strict=True):
        close(other.delta_weight(), one.delta_weight())
        for got, want in zip(other.lora_factors(), one.lora_factors(), strict=True):
            close(got, want)
        assert other.energy_kept() == pytest.approx(one.energy_kept(), rel=1e-5)


def test_explain_and_the_call_name_one_backend():
    layer = pair()[1][0]
    assert layer.problem(5).form == "output"
    trained_by(layer, x())
    for step in ("fwd", "bwd"):
        assert qk.backends.last_choice("qr_linear", step) == layer.explain(5, step)


def test_tune_has_nothing_to_choose():
    assert qk.tune(pair()[1], (4,), seconds=0.001, progress=False).contests == []


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": "input"}, "factors must be one of both, output, got 'input'"),
        ({"factors": True}, "factors must be a string, got bool"),
        ({"factors": "output", "dropout": 0.1}, "dropout must be 0 with factors='output'"),
        ({"factors": "output", "adapter": "lora_xs"}, "'lora_xs' takes the options .*factors"),
        ({"factors": "output", "adapter": "ohora"}, "'ohora' takes the options .*factors"),
    ],
)
def test_refused_before_anything_changes(options: dict[str, Any], message):
    model = base()
    with pytest.raises((TypeError, ValueError), match=message):
        qk.adapt(model, ["0"], rank=4, progress=False, **options)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", helpers.HALF, ids=str)
def test_half_precision_is_refused_at_the_start_with_the_reason(dtype):
    with pytest.raises(ValueError, match=r"^0.weight must be float32 or float64 .* rounded before"):
        moved("qr", base(dtype), factors="output")


@pytest.mark.parametrize("dtype", helpers.HALF, ids=str)
def test_cast_to_half_precision_it_is_right_and_cannot_start_again(dtype):
    """A small update of a large base product: h of a rounded one would lose it."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    layer = qk.QRLinear.from_linear(linear, rank=8, factors="output")
    with torch.no_grad():
        layer.lam.fill_(1e-3)
    layer.to(dtype)
    rows = torch.randn(8192, 64).to(dtype)
    delta = layer.lora_factors()[1].double() @ layer.lora_factors()[0].double()
    want = rows.double() @ delta.mT
    exact = F.linear(rows.double(), layer.weight.double(), layer.bias.double()).to(dtype)
    assert helpers.update_gain(layer(rows).detach(), exact, want) == pytest.approx(1, abs=0.02)
    assert "not composed: the output form" in layer.explain(64).reason
    with pytest.raises(ValueError, match="must be float32 or float64 with factors='output'"):
        qk.refresh(nn.Sequential(layer))


def test_under_autocast_h_is_not_made_of_a_rounded_product():
    both, output = pair()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = output(x()), both(x())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("function", ["qr_linear", "mixed_low_rank_linear", "lora_xs_linear"])
def test_functions_take_none_where_there_is_an_output_form(function):
    weight, up, rows = torch.randn(7, 9), torch.randn(7, 3), torch.randn(4, 9)
    down = up.mT @ weight
    if function == "qr_linear":
        lam = torch.randn(3)
        close(
            functional.qr_linear(rows, weight, None, up, None, lam),
            functional.qr_linear(rows, weight, None, up, down, lam),
        )
    elif function == "mixed_low_rank_linear":
        gates, index = torch.randn(2, 3, 3), torch.tensor([0, 1, 1, 0])
        close(
            functional.mixed_low_rank_linear(rows, weight, None, None, up, gates, index),
            functional.mixed_low_rank_linear(rows, weight, None, down, up, gates, index),
        )
    else:
        with pytest.raises(TypeError, match=r"a must be a torch.Tensor, got NoneType"):
            functional.lora_xs_linear(rows, weight, None, None, up, torch.randn(3, 3))


@pytest.mark.parametrize(("first", "second"), [("both", "output"), ("output", "both")])
def test_options_that_ask_for_other_factors_than_are_there_are_refused(first, second):
    layer = moved("qr", factors=first)[0]
    before = layer.options
    with pytest.raises(ValueError, match="must be of the factors that the layer keeps, q, "):
        layer.options = dataclasses.replace(before, factors=second)
    assert layer.options == before
