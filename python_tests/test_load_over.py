"""Loading a file into a model that has an adapter already, in the middle of training or after."""

from __future__ import annotations

import helpers
import pytest
import torch
from saved import ADAPTERS, base, moved, x
from torch import nn

import qrlora_kernels as qk


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(model, optimizer):
    model.train()
    optimizer.zero_grad()
    model(x()).square().sum().backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_optimizer_goes_on_with_what_was_loaded(adapter, merged, path):
    """New parameters stood still for good: the optimizer went on with the old ones."""
    model = moved(adapter, head=True)
    qk.save_adapter(model, path)
    want = model(x())
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    before = trainable(model)
    step(model, optimizer)
    step(model, optimizer)
    if merged:
        qk.merge(model)
    qk.load_adapter(model, path)
    assert not any(layer.merged for layer in qk.adapted_layers(model).values())
    after = trainable(model)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert helpers.same_bits(model(x()), want)
    step(model, optimizer)
    fresh = qk.load_adapter(base(), path)
    for name, p in trainable(fresh).items():
        assert not torch.equal(after[name], p), name


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_options_of_the_file_come_with_its_numbers(adapter, path):
    """Its scaling and its strength are part of what was trained."""
    model = qk.scale(moved(adapter), 0.5)
    model[2].scaling = 3.0
    qk.save_adapter(model, path)
    other = qk.load_adapter(moved(adapter), path)
    assert other[2].scaling == pytest.approx(3.0)
    assert other[2].options == model[2].options
    assert helpers.same_bits(other(x()), model(x()))


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("before", [*ADAPTERS, "qr of another rank", "lora_xs of another rank"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_over_another_kind_or_rank(adapter, before, merged, path):
    model = moved(adapter)
    qk.save_adapter(model, path)
    kind, *rank = before.split(" of another rank")
    other = moved(kind, **({"rank": 2} if rank else {}))
    if merged:
        qk.merge(other)
    qk.load_adapter(other, path)
    assert helpers.same_bits(other(x()), model(x()))
    qk.unload(other, merge=False)
    assert type(other[0]) is nn.Linear
    assert helpers.same_bits(other(x()), base()(x()))


class WithCore(nn.Linear):
    """A layer with an attribute that LoRA-XS would take."""

    core = 3


def with_core():
    torch.manual_seed(0)
    return nn.Sequential(WithCore(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Linear(16, 3)).eval()


def test_a_layer_that_cannot_take_the_files_kind_keeps_its_own(path):
    """It was found after the layer had lost its adapter."""
    qk.save_adapter(moved("lora_xs"), path)
    model = moved("qr", with_core())
    want = model(x())
    with pytest.raises(TypeError, match=r"0 must not have names of its own .* core"):
        qk.load_adapter(model, path)
    assert list(qk.adapted_layers(model)) == ["0", "2"]
    assert helpers.same_bits(model(x()), want)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_under_inference_mode_it_is_refused(adapted, path):
    """Factors that were made there fail in the first backward."""
    qk.save_adapter(moved("qr"), path)
    model = moved("qr") if adapted else base()
    with torch.inference_mode(), pytest.raises(ValueError, match="load_adapter must not be called"):
        qk.load_adapter(model, path)


# --- what a file brought goes with it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("second", ADAPTERS)
def test_one_adapters_head_does_not_stay_for_the_next(second, dtype, path, tmp_path):
    """The second answered with the first one's head, which also went on to train."""
    qk.save_adapter(moved("qr", base(dtype), head=True), path)
    other = tmp_path / "b.safetensors"
    alone = moved(second, base(dtype))
    qk.save_adapter(alone, other)
    model = qk.load_adapter(base(dtype), path)
    assert model[3].weight.requires_grad
    qk.load_adapter(model, other, strict=True)
    assert helpers.same_bits(model(x(dtype)), alone(x(dtype)))
    assert trainable(model).keys() == trainable(alone).keys()
    assert model[3].weight.dtype == dtype
    qk.load_adapter(model, path)
    fresh = qk.load_adapter(base(dtype), path)
    assert helpers.same_bits(model(x(dtype)), fresh(x(dtype)))
    assert trainable(model).keys() == trainable(fresh).keys()


def test_what_was_told_to_train_goes_on_after_a_file_that_brought_it(path, tmp_path):
    qk.save_adapter(moved("qr", head=True), path)
    other = tmp_path / "b.safetensors"
    qk.save_adapter(moved("qr"), other)
    model = moved("qr", head=True)
    own = model[3].weight.detach().clone()
    qk.load_adapter(model, path)
    with pytest.warns(UserWarning, match=r"beside the adapted layers: 3\.weight, 3\.bias"):
        qk.load_adapter(model, other)
    assert helpers.same_bits(model[3].weight, own)
    assert model[3].weight.requires_grad


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("files", [1, 2, 3])
def test_unload_puts_back_what_files_replaced_unless_it_merges(files, merge, path):
    with torch.no_grad():
        model, plain = base(), base()
        for number in range(files):
            trained = moved("qr", head=True)
            trained[3].bias.fill_(number)
            qk.save_adapter(trained, path)
            qk.load_adapter(model, path)
        want = model(x())
        qk.unload(model, merge=merge)
        if merge:
            assert torch.allclose(model(x()), want, atol=1e-5)
            assert float(model[3].bias[0]) == files - 1
        else:
            assert helpers.same_bits(model(x()), plain(x()))
    assert all(p.requires_grad for p in model.parameters())


def test_after_an_error_the_earlier_file_is_still_whole(path, tmp_path):
    qk.save_adapter(moved("qr", head=True), path)
    model = qk.load_adapter(base(), path)
    want = model(x())
    wrong = base()
    with torch.no_grad():
        wrong[2].weight.add_(1)
    other = tmp_path / "b.safetensors"
    qk.save_adapter(moved("qr", wrong), other)
    with pytest.raises(ValueError, match=r"2\.weight is not the weight"):
        qk.load_adapter(model, other)
    assert helpers.same_bits(model(x()), want)
