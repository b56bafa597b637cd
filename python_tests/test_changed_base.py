"""A base that was trained or replaced beside its adapter: nothing that was trained is lost."""

from __future__ import annotations

import warnings

import helpers
import pytest
import torch
from saved import ADAPTERS, base, moved, x
from torch import nn

import qrlora_kernels as qk

FOLDED = ADAPTERS | {
    "ohora folded": {**ADAPTERS["ohora"], "fold": True},
    "qr output": {**ADAPTERS["qr"], "factors": "output"},
}
changed = pytest.mark.filterwarnings("ignore:the base weights of")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def trained_through(adapter, model=None, weight=True):
    """With the base weight of layer 0 unfrozen, after two steps."""
    model = moved(adapter.partition(" ")[0], model, **FOLDED[adapter])
    model[0].weight.requires_grad_(weight)
    model[0].bias.requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x(model[0].weight.dtype)).square().sum().backward()
        optimizer.step()
    return model


@torch.no_grad()
def answer(model):
    return model(x(model[0].weight.dtype)[:, : model[0].in_features])


def changed_base(model):
    """The plain base with the weight that ``model`` ended with."""
    other = base(model[0].weight.dtype)
    with torch.no_grad():
        other[0].weight.copy_(model[0].base_weight)
    return other


@changed
@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("factors", ["auto", "stored"])
@pytest.mark.parametrize("adapter", FOLDED)
def test_a_base_that_trained_too_loads_over_either(adapter, factors, merged, path):
    """Its fingerprint was written, and neither base loaded the file."""
    model = trained_through(adapter)
    want = answer(model)
    if merged:
        qk.merge(model)
    with pytest.warns(UserWarning, match="base weights of 0 were changed"):
        qk.save_adapter(model, path, factors)
    for over in (base(), changed_base(model), moved("qr"), qk.merge(moved("lora_xs"))):
        qk.load_adapter(over, path)
        assert helpers.same_bits(answer(over), want)
        second = path.with_name("b.safetensors")
        qk.save_adapter(over, second)  # again, over a base that the file changed
        assert helpers.same_bits(answer(qk.load_adapter(base(), second)), want)


@changed
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_factors_of_a_changed_base_are_not_left_to_be_rebuilt(adapter, path):
    with pytest.raises(ValueError, match="'auto' or 'stored' for 0"):
        qk.save_adapter(trained_through(adapter), path, factors="rebuild")
    assert not path.exists()


@changed
@pytest.mark.parametrize("second", ADAPTERS)
def test_the_brought_weight_goes_before_the_next_file(second, path):
    """The next file's base was compared with the weight that the first had brought."""
    qk.save_adapter(trained_through("qr"), path)
    other = path.with_name("b.safetensors")
    alone = moved(second)
    qk.save_adapter(alone, other)
    for merged in (False, True):
        model = qk.load_adapter(base(), path)
        if merged:
            qk.merge(model)
        qk.load_adapter(model, other)
        assert helpers.same_bits(answer(model), answer(alone))
        assert not model[0].weight.requires_grad
        qk.load_adapter(model, path)
        qk.unload(model, merge=False)
        assert helpers.same_bits(answer(model), answer(base()))


@changed
def test_a_brought_weight_that_is_frozen_later_stays_in_the_next_file(path):
    model = trained_through("qr")
    qk.save_adapter(model, path)
    fresh = qk.load_adapter(base(), path)
    fresh[0].weight.requires_grad_(False)
    second = path.with_name("b.safetensors")
    qk.save_adapter(fresh, second)
    assert helpers.same_bits(answer(qk.load_adapter(base(), second)), answer(model))


def test_a_bias_that_trained_is_no_changed_weight(path, recwarn):
    model = trained_through("qr", weight=False)
    qk.save_adapter(model, path)
    fresh = qk.load_adapter(base(), path, strict=True)
    assert helpers.same_bits(answer(fresh), answer(model))
    assert not recwarn.list


@changed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_in_every_dtype(dtype, path):
    model = trained_through("qr", base(dtype))
    qk.save_adapter(model, path)
    assert helpers.same_bits(answer(qk.load_adapter(base(dtype), path)), answer(model))


def test_a_checkpoint_loaded_after_adapt_is_told_and_kept(path):
    model, checkpoint = moved("qr"), base()
    with torch.no_grad():
        checkpoint[0].weight.add_(0.1)
    model.load_state_dict(checkpoint.state_dict(), strict=False)
    with pytest.warns(UserWarning, match=r"0 were changed .*qk\.refresh"):
        qk.save_adapter(model, path)
    for over in (base(), checkpoint):
        assert helpers.same_bits(answer(qk.load_adapter(over, path)), answer(model))


def test_an_adapted_weight_that_is_tied_brings_the_other_along(path):
    def net(tie=True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
        model[0].weight = model[1].weight if tie else nn.Parameter(model[1].weight.detach().clone())
        return model

    model = qk.adapt(net(), ["1"], rank=2, progress=False)
    with torch.no_grad():
        model[1].weight.add_(0.1)
    with pytest.warns(UserWarning, match="base weights of 1 were changed"):
        qk.save_adapter(model, path)
    for tie in (True, False):
        assert helpers.same_bits(answer(qk.load_adapter(net(tie), path)), answer(model))


# --- what the check costs


def test_a_second_save_of_the_same_start_rebuilds_and_hashes_nothing(path, monkeypatch):
    model = moved("qr")
    qk.save_adapter(model, path)
    asked = []
    adapter, original = qk.QRLinear.adapter, qk.QRLinear.adapter.rebuild
    monkeypatch.setattr(adapter, "rebuild", lambda *a: asked.append(1) or original(*a))
    monkeypatch.setattr("qrlora_kernels.model.known.fingerprint", asked.append)
    with torch.no_grad():
        model[0].lam.add_(1)  # training goes on
    qk.save_adapter(model, path)
    assert not asked
    monkeypatch.undo()
    assert helpers.same_bits(answer(qk.load_adapter(base(), path)), answer(model))


@changed
def test_whatever_changes_after_a_save_is_seen_by_the_next(path):
    model = moved("qr")
    qk.save_adapter(model, path)
    with torch.no_grad():
        model[0].q[0, 0] += 1
        model[2].weight[1, 1] += 1
    qk.save_adapter(model, path)
    assert helpers.same_bits(answer(qk.load_adapter(base(), path)), answer(model))


@changed
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_file_with_its_base_is_refused_after_a_cast_of_the_model(adapter, path):
    """The weight that the first file overwrote was asked for its dtype, which the cast changed."""
    trained = trained_through(adapter)
    with torch.no_grad():
        for layer in qk.adapted_layers(trained).values():
            layer.weight.add_(0.1)
    qk.save_adapter(trained, path)
    model = qk.load_adapter(base(), path).double()
    want = model(x(torch.float64))
    with pytest.raises(ValueError, match="dtype must be float32, got float64: cast the model"):
        qk.load_adapter(model, path)
    assert torch.equal(model(x(torch.float64)), want)


@pytest.mark.parametrize("adapter", ["qr", "lora_xs"])
def test_a_weight_set_to_zero_is_summarised(adapter):
    model = moved(adapter)
    with torch.no_grad():
        model[0].weight.zero_()
    summary = qk.summary(model)
    assert summary.layers[0].energy is None
    assert "the weights of 0 are not those" in summary.table()


@pytest.mark.parametrize("merged", [False, True], ids=["pretrained", "merged"])
def test_other_weights_are_noticed_when_a_state_dict_brings_them(merged):
    """A checkpoint after adapt, or a merged model's state that lost its metadata."""
    other = moved("qr")
    if merged:
        qk.merge(other)
    else:
        with torch.no_grad():
            other[0].weight.add_(1.0)
        qk.unload(other, merge=False)
    state = dict(other.state_dict())
    model = moved("qr")
    with pytest.warns(UserWarning, match=r"brought other weights for 0.*qk\.refresh"):
        model.load_state_dict(state, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qk.refresh(model)
        model.load_state_dict(dict(model.state_dict()))
    qk.unload(model, merge=False)
    assert not model._load_state_dict_post_hooks
