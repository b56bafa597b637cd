"""``scale``: how strongly adapters count, in everything that reads them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import qrlora_kernels as qk

ADAPTERS = {
    "qr": {"rank": 4},
    "lora_xs": {"rank": 4},
    "ohora": {},
    "ohora folded": {"fold": True},
    "ohora lora": {"product": "lora", "rank": 4},
    "ohora materialised": {"product": "materialised"},
    "qr scaled": {"rank": 4, "scaling": 0.5},
    "lora_xs with alpha": {"rank": 4, "alpha": 2.0},
    "qr with dropout": {"rank": 4, "dropout": 0.5},
}
NOT_LOW_RANK = ("ohora", "ohora folded", "ohora materialised")
X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))


def adapted(adapter="qr", model=None):
    model = net() if model is None else model
    qk.adapt(model, ["0", "1"], adapter.split()[0], progress=False, **ADAPTERS[adapter])
    with torch.no_grad():
        for layer in qk.adapted_layers(model).values():
            for name in layer.trainables:
                getattr(layer, name).add_(torch.randn_like(getattr(layer, name)))
    return model.eval()


def exact(model, strength, x=X):
    """The model's answer in fp64 through its dense updates at ``strength``."""
    base = copy.deepcopy(model)
    qk.scale(base, 1.0)
    x = x.double()
    for layer in base:
        weight = layer.weight.double() + strength * layer.delta_weight().double()
        x = nn.functional.linear(x, weight, layer.bias.double())
    return x


def close(y, want):
    torch.testing.assert_close(y.double(), want, atol=1e-5 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("strength", [0.5, 2.0, -1.0, 1.0])
@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_the_update_counts_so_much(adapter, strength):
    model = adapted(adapter)
    want = exact(model, strength)
    assert qk.scale(model, strength) is model
    close(model(X), want)
    qk.merge(model)
    close(model(X), want)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_at_zero_it_is_the_base(adapter, dtype, train):
    base = net().to(dtype)
    if "folded" in adapter and dtype == torch.bfloat16:
        pytest.skip("refused")
    model = adapted(adapter, copy.deepcopy(base)).train(train)
    qk.scale(model, 0)
    x = X.to(dtype)
    assert torch.equal(model(x), base(x))
    assert all(not layer.delta_weight().any() for layer in model)
    qk.merge(model.eval())
    assert torch.equal(model(x), base(x))
    qk.unload(model)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_back_at_one_it_is_what_it_was(adapter):
    model = adapted(adapter)
    before = model(X)
    for strength in (0.0, 0.3, 1.0):
        qk.scale(model, strength)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_files_keep_it(adapter, strength, tmp_path):
    model = qk.scale(adapted(adapter), strength)
    qk.save_adapter(model, tmp_path)
    other = qk.load_adapter(net(), tmp_path).eval()
    assert torch.equal(other(X), model(X))
    assert {layer.options.strength for layer in other} == {strength}
    other = qk.load_adapter(adapted(adapter), tmp_path)
    assert torch.equal(other(X), model(X))


def test_a_state_dict_of_another_strength_is_no_other_model():
    model, other = qk.scale(adapted(), 0.5), adapted()
    with pytest.raises(RuntimeError, match="strength"):
        other.load_state_dict(model.state_dict())
    qk.scale(other, 0.5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("adapter", [a for a in ADAPTERS if a not in NOT_LOW_RANK])
def test_lora_factors_hold_it(adapter):
    model = qk.scale(adapted(adapter), 0.5)
    for layer in model:
        a, b = layer.lora_factors()
        torch.testing.assert_close(b @ a, layer.delta_weight(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter", ["qr scaled", "lora_xs with alpha"])
def test_it_multiplies_the_scaling(adapter):
    model = adapted(adapter)
    want = exact(model, 1.5)  # of scaling 0.5
    qk.scale(model, 0.5)
    for layer in model:
        assert layer.scaling == 0.5
        layer.scaling = 1.5
        assert layer.scaling == 1.5
        assert layer.options.strength == 0.5
    close(model(X), want)
    qk.scale(model, 1 / 3)
    close(model(X), exact(model, 1 / 3))


def test_the_gradient_is_as_strong():
    full, half = adapted(), qk.scale(adapted(), 0.5)
    for model in (full, half):
        model[0](X).sum().backward()
    torch.testing.assert_close(half[0].lam.grad, full[0].lam.grad / 2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_before(backend):
    torch._dynamo.reset()
    model = adapted()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for strength in (1.0, 0.5, 0.0, 0.25, 0.0, 1.0):
        qk.scale(model, strength)
        assert torch.equal(compiled(X), model(X))


def test_disabled_and_part_of_a_model():
    base, model = net(), adapted()
    qk.scale(nn.Sequential(model[0]), 0.0)
    assert torch.equal(model[0](X), base[0](X))
    assert not torch.equal(model[1](X), base[1](X))
    with qk.disabled(qk.scale(model, 2.0)):
        assert torch.equal(model(X), base(X))


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(2), torch.tensor(0.5), 1])
def test_numbers_of_other_libraries(value, tmp_path):
    model = qk.scale(adapted(), value)
    assert type(model[0].options.strength) is float
    qk.save_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_what_is_no_strength_is_refused(value, error):
    model = adapted()
    with pytest.raises(error, match="strength must be"):
        qk.scale(model, value)
    assert model[0].options.strength == 1.0


def test_merged_layers_are_refused_and_nothing_changes():
    model = adapted()
    model[1].merge()
    with pytest.raises(ValueError, match=r"1 must not be merged.*unmerge\(\)"):
        qk.scale(model, 0.5)
    assert model[0].options.strength == 1.0
    with pytest.raises(ValueError, match="must hold adapted layers"):
        qk.scale(net(), 0.5)
