"""Adapters over quantised weights: the layer, its copies, casts, words and rows."""

from __future__ import annotations

import copy

import pytest
import torch
from quantised_models import (
    adapt,
    adapted,
    linear,
    move,
    net,
    of_each_adapter,
    of_each_kind,
    quantise,
    x,
)

import qrlora_kernels as qk
from qrlora_kernels.nn import base_weight, dequantising, quantised

# --- the layer


@of_each_kind
@of_each_adapter
def test_a_copy_answers_alike(kind, adapter):
    model = move(adapt(net(kind), adapter))
    other = copy.deepcopy(model)
    assert torch.equal(other(x()), model(x()))
    move(other)
    assert not torch.equal(other(x()), model(x()))


@of_each_kind
@of_each_adapter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_casts_of_the_model(kind, adapter, dtype):
    model = move(adapt(net(kind), adapter))
    want = model(x())
    bits = (
        base_weight.quantised(model.first)
        .parts()["qdata" if "qdata" in base_weight.quantised(model.first).parts() else ""]
        .clone()
    )
    model = model.to(dtype)
    got = model(x(dtype))
    assert got.dtype == dtype
    assert (got.float() - want.float()).norm() <= 2e-2 * want.float().norm()
    held = quantised.held(model.first.weight)
    assert torch.equal(held, bits)
    assert not model.first.base_changed()


@of_each_kind
def test_taken_off_it_is_the_layer_that_it_was(kind):
    model = net(kind)
    before = {n: type(m) for n, m in model.named_modules()}
    want = model(x())
    adapt(model)
    qk.unload(model, merge=False)
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert torch.equal(model(x()), want)


def test_the_words_of_a_layer():
    _, own = adapted("nf4", "qr")
    assert isinstance(own, qk.QRLinear)
    assert "in_features=64, out_features=96" in repr(own)
    assert own.explain(2048).name
    assert 0 < own.energy_kept() < 1
    assert own.merged is False


@of_each_kind
def test_summary_counts_what_is_there(kind):
    model = adapt(net(kind))
    table = qk.summary(model, show=False)
    row = table.layers[0]
    few = base_weight.quantised(model.first)
    assert row.shape == (96, 64)
    assert row.weight_bytes == sum(t.nbytes for t in few.parts().values())
    assert row.weight_bytes < 2 * 96 * 64
    assert table.parameters["frozen"] >= 2 * 96 * 64


@of_each_kind
def test_refresh_and_another_rank(kind):
    model = move(adapt(net(kind)))
    qk.set_rank(model, 9)
    assert model.first.rank == 9
    qk.refresh(model)
    assert not model.first.lam.any()
    assert torch.isfinite(model(x())).all()


@of_each_kind
@of_each_adapter
def test_rows_of_a_batch_with_adapters_of_their_own(kind, adapter):
    model = adapt(net(kind), adapter)
    bank = qk.AdapterBank(model, capacity=2)
    for name in ("a", "b"):
        bank.add(name)
    with bank.use(["a", "b", "a"]):
        y = model(x().view(3, 3, 64))
    torch.testing.assert_close(y, model(x().view(3, 3, 64)), rtol=2e-2, atol=2e-2)


@of_each_kind
@of_each_adapter
def test_rows_in_another_dtype(kind, adapter):
    """Their numbers are cast as the layer's own are."""
    model = adapt(net(kind), adapter)
    bank = qk.AdapterBank(model, capacity=1)
    bank.add("a")
    rows = x(torch.float64).view(3, 3, 64)
    with bank.use(["a"] * 3):
        y = model.first(rows)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, model.first(rows), rtol=1e-2, atol=1e-2)


def test_quantised_after_it_was_adapted():
    """As torchao's ``quantize_`` does to every nn.Linear; the factors are of the weight before."""
    layer = qk.QRLinear.from_linear(linear(torch.float32), rank=6)
    quantise(layer, "int8")
    assert layer.base_changed()
    assert layer(x(torch.float32)).shape == (9, 96)
    assert dequantising.base(layer, x(torch.float32)).shape == (9, 96)
