"""Merging into a quantised weight: refused, or done into the dense one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantised_models import ADAPTERS, KINDS, adapt, dense, move, net, x
from torch import nn

import qrlora_kernels as qk
from qrlora_kernels.nn import base_weight

of_each_kind = pytest.mark.parametrize("kind", KINDS)
of_each_adapter = pytest.mark.parametrize("adapter", ADAPTERS)


@of_each_kind
@pytest.mark.parametrize("doing", ["merge", "unload", "to_linear", "layer"])
def test_merging_is_refused_with_the_way_out(kind, doing):
    model = move(adapt(net(kind)))
    want, weight = model(x()), model.first.weight
    ways = {
        "merge": lambda: qk.merge(model),
        "unload": lambda: qk.unload(model),
        "to_linear": lambda: model.first.to_linear(),
        "layer": lambda: model.first.merge(),
    }
    with pytest.raises(ValueError, match=r"weight must be dense to be merged.*dequantize=True"):
        ways[doing]()
    assert torch.equal(model(x()), want)
    assert model.first.weight is weight


@of_each_kind
@of_each_adapter
@pytest.mark.parametrize("dtype", [True, torch.bfloat16, torch.float32])
def test_merged_into_the_dense_weight(kind, adapter, dtype):
    model = move(adapt(net(kind), adapter))
    want = model(x())
    layer = model.first
    exact = dense(layer) + layer.delta_weight().double()
    qk.merge(model, dequantize=dtype)
    assert layer.merged
    assert layer.weight.shape == (96, 64)
    if dtype is not True:
        assert layer.weight.dtype == dtype
    assert (layer.weight.double() - exact).norm() <= 5e-3 * exact.norm()
    wide = layer.weight.dtype
    y = F.linear(x(wide), layer.weight, layer.bias.to(wide))
    assert torch.equal(layer.eval()(x(wide)), y)
    qk.unmerge(model)
    assert torch.equal(model(x()), want)


@of_each_kind
def test_a_merged_state_dict_is_a_plain_one(kind):
    model = move(adapt(net(kind)))
    model(x())
    qk.merge(model, dequantize=torch.bfloat16)
    plain = nn.ModuleDict({"first": nn.Linear(64, 96), "second": nn.Linear(96, 64)}).bfloat16()
    plain["head"] = nn.Linear(64, 3).bfloat16()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain["first"](x()), model.first.eval()(x()))


@of_each_kind
def test_unloaded_into_plain_layers(kind):
    model = move(adapt(net(kind)))
    want, layer = model(x()), model.first
    qk.unload(model, dequantize=torch.bfloat16)
    assert model.first is layer
    assert type(layer) is nn.Linear
    assert set(vars(layer)) == set(vars(nn.Linear(64, 96)))
    assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert (model(x()).double() - want.double()).norm() <= 2e-2 * want.double().norm()
    adapt(model)


@of_each_kind
def test_a_layer_of_its_own(kind):
    model = move(adapt(net(kind)))
    layer = model.first
    plain = layer.to_linear(dequantize=torch.bfloat16)
    assert type(plain) is nn.Linear
    assert base_weight.is_quantised(layer)
    assert torch.equal(layer(x()), model.first(x()))
    again = layer.to_linear(merge=False)
    assert type(again) is type(net(kind).first)
    assert again.weight is layer.weight


@of_each_kind
def test_a_merged_layer_saves_its_adapter(kind, tmp_path):
    model = move(adapt(net(kind)))
    want = model(x())
    qk.merge(model, dequantize=True)
    qk.save_adapter(model, tmp_path / "a")
    assert torch.equal(qk.load_adapter(net(kind), tmp_path / "a")(x()), want)


def test_dequantize_is_checked():
    model = move(adapt(net("nf4")))
    for wrong in ("bf16", torch.int8, 1):
        with pytest.raises(TypeError, match=r"dequantize must be"):
            qk.merge(model, dequantize=wrong)
