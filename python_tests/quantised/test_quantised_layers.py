"""Adapters over quantised weights: where they start and what they compute."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import update_gain
from quantised_models import (
    SAME,
    adapt,
    adapted,
    dense,
    in_each_dtype,
    move,
    net,
    of_each_adapter,
    of_each_kind,
    twin,
    x,
)

import qrlora_kernels as qk
from qrlora_kernels.functional import low_rank_onto
from qrlora_kernels.nn import base_weight

# --- the start


@of_each_kind
@in_each_dtype
def test_the_base_answers_as_its_library_does(kind, dtype):
    """Bit for bit, or no further from fp64 where the library rounds the sum too."""
    layer, own = adapted(kind, "qr", dtype)
    x0 = x(dtype, 33).requires_grad_()
    want = layer(x0)
    with qk.disabled(own):
        got = own(x0)
    assert got.dtype == want.dtype
    if kind in SAME or dtype == torch.float32:
        error = 0 if kind in SAME else 1e-6
        assert (got - want).norm() <= error * want.norm()
        return
    exact = x0.double() @ dense(layer).t() + layer.bias.double()
    assert (got - exact).norm() <= (want - exact).norm()
    assert (got - want).norm() <= 5e-3 * want.norm()


@of_each_kind
@pytest.mark.parametrize("adapter", ["qr", "ohora"])
def test_it_starts_at_the_base(kind, adapter):
    """Within the rounding of one element here and there: kernels sum in another order."""
    layer, own = adapted(kind, adapter)
    want, got = layer(x(tokens=257)), own(x(tokens=257))
    if kind in SAME:
        assert (got != want).float().mean() <= 1e-3
    assert (got.double() - want.double()).norm() <= 5e-3 * want.double().norm()


@of_each_kind
def test_the_start_is_that_of_the_dense_weight(kind):
    layer, own = adapted(kind, "qr", torch.float32)
    other = qk.linalg.pivoted_qr(dense(layer).float(), 6)
    assert torch.equal(own.pivots, other.pivots)
    torch.testing.assert_close(own.q, other.q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "bnb_int8", "int8"])
def test_a_model_is_started_layer_by_layer(kind, monkeypatch):
    """Never more than one dense weight at a time."""
    alive, most = weakref.WeakSet(), 0
    made = base_weight.matrix

    def matrix(*args):
        nonlocal most
        dense = made(*args)
        alive.add(dense)
        gc.collect()
        most = max(most, len(alive))
        return dense

    monkeypatch.setattr(base_weight, "matrix", matrix)
    adapt(net(kind), "lora_xs")
    assert most == 1


# --- forward and backward


@of_each_kind
@of_each_adapter
@in_each_dtype
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}])
def test_it_is_the_adapter_over_the_dense_weight(kind, adapter, dtype, options):
    """Bit for bit, forward and backward, dropout too."""
    _, own = adapted(kind, adapter, dtype, **options)
    move(own)
    other = twin(own, dtype)
    results = []
    for one in (own, other):
        one.train()
        x0 = x(dtype).requires_grad_()
        torch.manual_seed(5)
        y = one(x0)
        y.backward(torch.ones_like(y))
        grads = [getattr(one, n).grad for n in one.trainables]
        results.append((y, x0.grad, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(t.abs().sum() > 0 for t in results[0])


@of_each_kind
@of_each_adapter
@pytest.mark.parametrize("train", [True, False])
def test_training_and_eval_mode_give_the_same(kind, adapter, train):
    _, own = adapted(kind, adapter)
    move(own)
    want = own.train()(x())
    with torch.set_grad_enabled(train):
        assert torch.equal(own.eval()(x()), want)
    assert torch.equal(own.train()(x()), want)


@of_each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16])
def test_under_autocast(kind, dtype, asked):
    layer, own = adapted(kind, "qr", dtype)
    for given in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", asked):
            want, got = layer(x(given)), own(x(given))
            with qk.disabled(own):
                alone = own(x(given))
        assert kind not in SAME or torch.equal(alone, want)
        for one in (alone, got):
            assert (one.float() - want.float()).norm() <= 1e-2 * want.float().norm()
    got.float().sum().backward()
    assert own.lam.grad.abs().sum() > 0


@of_each_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_x_of_another_dtype(kind, dtype):
    layer, own = adapted(kind, "qr", torch.bfloat16)
    move(own)
    x0 = x(dtype).requires_grad_()
    y = own(x0)
    y.sum().backward()
    exact = x0.double() @ (dense(layer) + own.delta_weight().double()).t() + layer.bias.double()
    assert y.dtype == dtype
    assert x0.grad.dtype == dtype
    assert (y - exact).norm() <= 1e-2 * exact.norm()


def test_int8_weights_are_not_rounded_for_an_fp32_input():
    """Of a half-precision model: the library's product of it is that with codes times scales."""
    layer, own = adapted("int8", "qr", torch.bfloat16)
    layer.bias.data = layer.bias.data.float()
    want = layer(x(torch.float32))
    with qk.disabled(own):
        got = own(x(torch.float32))
    assert (got - want).norm() <= 1e-6 * want.norm()


@of_each_kind
@of_each_adapter
def test_a_small_update_survives(kind, adapter):
    """‖ΔW‖ = 1e-4 ‖W‖ in bf16, of which the base's own product plus an update keeps a few %."""
    layer, own = adapted(kind, adapter)
    matrix = dense(layer)
    silent = own.silent()
    with torch.no_grad():
        for name in own.trainables:
            own._parameters[name].copy_(silent[name] + 0.1 * torch.randn_like(silent[name]))
        ratio = own.delta_weight().double().norm() / matrix.norm()
        own.scaling = own.scaling * 1e-4 / float(ratio)
    tokens = x(tokens=8192)
    update = tokens.double() @ own.delta_weight().double().t()
    with torch.no_grad():
        moved = own(tokens)
        own.scaling = 1e-30 * own.scaling
        still = own(tokens)
    assert update_gain(moved, still, update) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("kind", ["bnb_int8", "int8"])
def test_a_small_update_onto_the_product_of_the_library(kind):
    """Which comes unrounded of an fp32 input, without a dense weight."""
    layer, own = adapted(kind, "qr")
    gate = 1e-4 * torch.randn(6)
    tokens = x(tokens=8192)
    update = (tokens.double() @ own.r.double().t() * gate.double()) @ own.q.double().t()
    with torch.no_grad():
        y0 = layer(tokens.float())
        assert y0.dtype == torch.float32
        y = low_rank_onto(y0, tokens, own.r.bfloat16(), own.q.bfloat16(), gate)
        exact = tokens.double() @ dense(layer).t() + layer.bias.double()
        assert (y0 - exact).norm() <= (3e-7 if kind == "bnb_int8" else 3e-3) * exact.norm()
    assert update_gain(y, y0.bfloat16(), update) == pytest.approx(1, abs=0.06)


@of_each_kind
@of_each_adapter
def test_it_trains(kind, adapter):
    torch.manual_seed(0)
    model = adapt(net(kind), adapter, trainable=["head"])
    bits = {n: base_weight.digest(m) for n, m in model.named_modules() if n in ("first", "second")}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    target = torch.arange(33) % 3
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(x(tokens=33)).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert bits == {n: base_weight.digest(model.get_submodule(n)) for n in bits}
