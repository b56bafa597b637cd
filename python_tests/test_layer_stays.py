"""An adapted layer is the object that it was: what hung on it hangs on it still, and goes back."""

from __future__ import annotations

import functools

import pytest
import torch
from one_layer import ADAPTERS, adapt, move, x
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import qrlora_kernels as qk

# --- what hangs on the layer


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_hooks_and_attributes_stay_and_go_back(adapter):
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    layer = model[0]
    calls: list[str] = []
    layer.register_forward_hook(lambda m, a, y: calls.append("forward"))
    layer.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    layer.register_full_backward_hook(lambda m, dx, dy: calls.append("backward"))
    layer.register_state_dict_pre_hook(lambda m, p, k: calls.append("state"))
    layer.register_load_state_dict_post_hook(lambda m, k: calls.append("loaded"))
    layer.weight.register_hook(lambda g: calls.append("never: it is frozen"))
    layer.lr_group, layer._is_hf_initialized = "low", True
    layer.weight.tag = "mine"
    before, parameters = dict(vars(layer)), dict(layer._parameters)
    adapt(model, adapter)
    assert model[0] is layer
    model(x().requires_grad_()).sum().backward()
    layer.load_state_dict(layer.state_dict())
    assert calls == ["pre", "forward", "backward", "state", "loaded"]
    assert layer.lr_group == "low"
    assert layer._is_hf_initialized
    assert layer.weight.tag == "mine"
    qk.unload(model, merge=False)
    assert model[0] is layer
    assert type(layer) is nn.Linear
    assert vars(layer) == before
    assert all(layer._parameters[name] is p for name, p in parameters.items())
    calls.clear()
    model(x())
    assert calls == ["pre", "forward"]


def test_a_hook_may_be_taken_off_by_the_handle_from_before():
    model = nn.Sequential(nn.Linear(8, 16))
    calls = []
    handle = model[0].register_forward_hook(lambda m, a, y: calls.append(1))
    adapt(model)
    handle.remove()
    model(x())
    assert not calls


def test_an_optimizer_and_a_reference_from_before_still_hold():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    held = model[0]
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1.0)
    adapt(model)
    optimizer.add_param_group({"params": [held.lam]})
    model(x()).sum().backward()
    optimizer.step()
    assert held.lam.abs().max() > 0
    assert held is model[0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_compiled_before_follows(backend):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    y = compiled(x())
    adapt(model)
    move(model[0])
    torch.testing.assert_close(compiled(x()), model(x()))
    assert not torch.allclose(compiled(x()), y)
    compiled(x()).sum().backward()
    assert model[0].lam.grad is not None
    qk.unload(model, merge=False)
    torch.testing.assert_close(compiled(x()), y)


def test_a_module_in_two_places_is_one_layer_still():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.again = self.first
            self.inside = nn.ModuleDict({"same": self.first})

        def forward(self, x):
            return self.inside["same"](self.again(self.first(x)))

    torch.manual_seed(0)
    model, plain = Twice(), Twice()
    plain.load_state_dict(model.state_dict())
    adapt(model, "lora_xs", ["first"])
    assert model.first is model.again is model.inside["same"]
    move(model.first)
    delta = model.first.delta_weight()
    with torch.no_grad():
        plain.first.weight += delta
    assert torch.allclose(model(x()), plain(x()), atol=1e-4)
    qk.unload(model)
    assert type(model.again) is nn.Linear
    assert torch.allclose(model(x()), plain(x()), atol=1e-4)


@pytest.mark.parametrize("target", ["first", "inside.same", "again"])
def test_loading_reaches_a_module_under_all_its_names(target, tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(8, 8)
            self.again = self.first
            self.inside = nn.ModuleDict({"same": self.first})

        def forward(self, x):
            return self.inside["same"](self.again(self.first(x)))

    model = adapt(Twice(), targets=[target])
    move(model.first)
    qk.save_adapter(model, tmp_path / "a.safetensors")
    other = qk.load_adapter(Twice(), tmp_path / "a.safetensors")
    assert torch.equal(other(x()), model(x()))
    other = qk.load_adapter(adapt(Twice(), targets=[target]), tmp_path / "a.safetensors")
    assert torch.equal(other(x()), model(x()))
    assert type(qk.unload(other).again) is nn.Linear


def test_a_short_cut_to_a_parent_is_adapted_once():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            self.short = self.encoder

        def forward(self, x):
            return self.short(x)

    model = adapt(Model(), targets=["0", "1"])
    assert len(qk.adapted_layers(model)) == 2
    assert isinstance(model.short[1], qk.QRLinear)
    model = adapt(Model(), targets=["short.0", "encoder.0"])
    assert list(qk.adapted_layers(model)) == ["encoder.0"]


# --- what cannot be moved is refused by name


def spectral(layer):
    return parametrizations.spectral_norm(layer)


def own(layer):
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


def bias_only(layer):
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    return layer


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


def weight_norm(layer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def partial_forward(layer):
    layer.forward = functools.partial(nn.Linear.forward, layer)
    return layer


def other_forward(layer):
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spectral, "0 must have a plain weight, got a parametrised one"),
        (own, "0 must have a plain weight, got a parametrised one"),
        (bias_only, "0 must have a plain weight, got a parametrised one"),
        (pruned, r"0\.weight must be a parameter"),
        (weight_norm, r"0\.weight must be a parameter"),
        (partial_forward, "0 must compute a plain linear product"),
        (other_forward, "0 must compute a plain linear product"),
    ],
)
def test_what_cannot_stay_is_refused_by_name(change, message):
    model = nn.Sequential(change(nn.Linear(8, 16)))
    kind, before = type(model[0]), dict(vars(model[0]))
    with pytest.raises(TypeError, match=message):
        adapt(model)
    assert type(model[0]) is kind
    assert vars(model[0]) == before


@pytest.mark.parametrize("merge", [False, True])
def test_parametrised_afterwards_it_cannot_be_taken_off(merge):
    model = adapt(nn.Sequential(nn.Linear(8, 16)))
    y = model(x())
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert torch.equal(model(x()), y)
    with pytest.raises(TypeError, match="something stands on top of it"):
        qk.unload(model, merge=merge)
    parametrize.remove_parametrizations(model[0], "weight")
    qk.unload(model, merge=merge)
    assert type(model[0]) is nn.Linear


def test_lazy_layers_are_refused_until_they_have_a_weight():
    with pytest.raises(TypeError, match=r"must have a weight, got .*LazyLinear before its first"):
        qk.QRLinear.from_linear(nn.LazyLinear(16), rank=3)
    model = nn.Sequential(nn.Linear(8, 16), nn.LazyLinear(4))
    for target in ("0", "1"):  # what has no weight cannot be frozen either
        with pytest.raises(ValueError, match=r"none yet in 1\.weight, 1\.bias"):
            adapt(model, targets=[target])
    assert type(model[0]) is nn.Linear
    model(x())
    assert isinstance(adapt(model, targets=["1"])[1], qk.QRLinear)


def test_an_interrupted_change_is_taken_back(monkeypatch):
    """And the next call is a first one again, which freezes the rest."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    before = [dict(vars(layer)) for layer in model]
    take_state, taken = qk.QRLinear.take_state, []

    def fails_at_the_second(layer, state):
        taken.append(layer)
        if len(taken) == 2:
            raise KeyboardInterrupt
        take_state(layer, state)

    with monkeypatch.context() as patch:
        patch.setattr(qk.QRLinear, "take_state", fails_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            adapt(model, targets=["0", "1"])
    assert [type(layer) for layer in model] == [nn.Linear] * 3
    assert [vars(layer) for layer in model] == before
    assert all(p.requires_grad for p in model.parameters())
    adapt(model, targets=["0"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.lam"]
