"""Models whose weights accelerate keeps elsewhere live through everything that whole ones do.

The model that is all in memory says what is right, to the bit.
"""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from offloaded_net import ADAPTERS, HOW, Net, adapted, net, offloaded, step, x
from torch import nn

import qrlora_kernels as qk


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapted_and_trained_as_if_all_were_in_memory(adapter, how, tmp_path):
    whole, away = adapted(net(), adapter), adapted(offloaded(how, tmp_path), adapter)
    assert torch.equal(whole(x()), away(x()))
    for checkpoints in (False, True):
        whole.checkpoints = away.checkpoints = checkpoints
        for a, b in zip(step(whole), step(away), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(whole(x()), away(x()))
    assert away.down.weight.is_meta or how == "dispatched"


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_saved_merged_and_taken_off_as_if_all_were_in_memory(adapter, how, tmp_path):
    whole, away = adapted(net(), adapter), adapted(offloaded(how, tmp_path), adapter)
    step(whole), step(away)
    trained_y = whole(x())
    qk.save_adapter(away, tmp_path / "a.safetensors")
    for model in (net(), offloaded(how, tmp_path / "other")):
        assert torch.equal(qk.load_adapter(model, tmp_path / "a.safetensors")(x()), trained_y)
    assert not torch.equal(net()(x()), trained_y)
    merged = qk.merge(whole)(x())
    assert torch.equal(qk.merge(away)(x()), merged)
    assert all(layer.merged for layer in qk.adapted_layers(away).values())
    qk.save_adapter(away, tmp_path / "b.safetensors")
    assert torch.equal(qk.load_adapter(net(), tmp_path / "b.safetensors")(x()), trained_y)
    assert torch.equal(qk.unmerge(away)(x()), trained_y)
    qk.unload(away)
    assert type(away.up) is nn.Linear
    assert torch.equal(away(x()), merged)
    remove_hook_from_submodules(away)
    assert torch.equal(away(x()), merged)
    assert torch.equal(away.up.weight, whole.up.weight)


@pytest.mark.parametrize(
    ("adapter", "how", "merged"),
    [
        ("qr", "cpu", False),
        ("lora_xs", "cpu", True),
        ("ohora", "disk", True),
        ("qr", "dispatched", True),
        ("qr", "sequence", True),
    ],
)
def test_taken_off_leaves_what_was_there(adapter, how, merged, tmp_path):
    away = offloaded(how, tmp_path)
    before = [dict(vars(layer)) for layer in (away.up, away.down)]
    hooks = [layer._hf_hook for layer in (away.up, away.down) if hasattr(layer, "_hf_hook")]
    adapted(away, adapter, trainable=())
    step(away)
    if merged:
        qk.merge(away)
    qk.unload(away, merge=False)
    for layer, was in zip((away.up, away.down), before, strict=True):
        assert type(layer) is nn.Linear
        assert vars(layer).keys() == was.keys()
    assert hooks == [layer._hf_hook for layer in (away.up, away.down) if hasattr(layer, "_hf_hook")]
    assert torch.equal(away(x()), net()(x()))
    remove_hook_from_submodules(away)
    assert torch.equal(away(x()), net()(x()))


@pytest.mark.parametrize("how", HOW)
def test_hooks_are_removed_from_an_adapted_model(how, tmp_path):
    whole, away = adapted(net()), adapted(offloaded(how, tmp_path))
    step(whole), step(away)
    remove_hook_from_submodules(away)
    assert torch.equal(away(x()), whole(x()))
    for a, b in zip(step(whole), step(away), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(qk.merge(away)(x()), qk.merge(whole)(x()))
    remove_hook_from_submodules(away)
    assert torch.equal(qk.unload(away)(x()), qk.unload(whole)(x()))
    assert type(away.up) is nn.Linear


@pytest.mark.parametrize("how", ["disk", "sequence"])
def test_hooks_are_removed_from_a_merged_model(how, tmp_path):
    whole, away = adapted(net()), adapted(offloaded(how, tmp_path))
    step(whole), step(away)
    y = whole(x())
    qk.merge(whole), qk.merge(away)
    remove_hook_from_submodules(away)
    assert torch.equal(away(x()), whole(x()))
    assert away.up.merged
    assert torch.equal(away.up.state_dict()["weight"], whole.up.weight)
    assert torch.equal(qk.unmerge(away)(x()), y)


@pytest.mark.parametrize("how", HOW)
def test_a_copy_is_a_model_of_its_own(how, tmp_path):
    away = adapted(offloaded(how, tmp_path))
    other = copy.deepcopy(away)
    y = away(x())
    step(other)
    assert torch.equal(away(x()), y)
    assert not torch.equal(other(x()), y)
    qk.merge(other)
    assert torch.equal(away(x()), y)
    assert not away.up.merged


@pytest.mark.parametrize("how", ["cpu", "disk", "sequence"])
def test_offloaded_after_adapt_trains_or_says_what_to_do(how, tmp_path):
    model = adapted(net())
    y = model(x())
    offloaded(how, tmp_path, model)
    assert torch.equal(model.eval()(x()), y)
    with pytest.raises(RuntimeError, match="dispatch the model first"):
        model.train()(x())


@pytest.mark.parametrize("how", ["disk", "sequence"])
def test_start_again(how, tmp_path):
    away = adapted(offloaded(how, tmp_path), trainable=())
    step(away)
    lam = away.up.lam
    qk.refresh(away)
    assert away.up.lam is lam
    assert torch.equal(away(x()), adapted(net())(x()))


def test_a_weight_that_is_nowhere_is_refused_by_name():
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match=r"up\.weight must hold data, got a tensor on"):
        adapted(model)
