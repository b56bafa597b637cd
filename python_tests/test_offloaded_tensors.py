"""What trains stays in memory beside weights that are away; files and state dicts reach both."""

from __future__ import annotations

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from offloaded_net import adapted, net, offloaded, step, x
from torch import nn

import qrlora_kernels as qk


@pytest.mark.parametrize("how", ["disk", "sequence"])
def test_a_trained_head_stays_in_memory_and_goes_back(how, tmp_path):
    away = offloaded(how, tmp_path)
    hook = away.head._hf_hook
    adapted(away, trainable="head")
    step(away)
    trained = [p.detach().clone() for p in away.head.parameters()]
    assert not torch.equal(trained[0], net().head.weight)
    y = away(x())
    qk.save_adapter(away, tmp_path / "a.safetensors")
    other = qk.load_adapter(offloaded(how, tmp_path / "other"), tmp_path / "a.safetensors")
    assert torch.equal(other(x()), y)
    assert all(p.requires_grad and not p.is_meta for p in other.head.parameters())
    qk.unload(other, merge=False)
    assert torch.equal(other(x()), net()(x()))  # the file's head went with it
    qk.unload(away, merge=False)
    assert away.head._hf_hook is hook
    assert away.head.weight.is_meta
    remove_hook_from_submodules(away)
    for p, value in zip(away.head.parameters(), trained, strict=True):
        assert torch.equal(p, value)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_a_file_with_a_changed_base_over_weights_that_are_away(how, tmp_path):
    whole = adapted(net())
    with torch.no_grad():
        whole.up.weight.mul_(1.5)
    step(whole)
    with pytest.warns(UserWarning, match="changed after their adapters began"):
        qk.save_adapter(whole, tmp_path / "a.safetensors")
    away = qk.load_adapter(offloaded(how, tmp_path), tmp_path / "a.safetensors")
    assert torch.equal(away(x()), whole(x()))
    qk.unload(away, merge=False)
    assert torch.equal(away(x()), net()(x()))


def test_buffers_that_are_away_are_saved_and_loaded(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8))

    whole = qk.adapt(model(), ["0"], rank=2, progress=False)
    for _ in range(3):
        whole(x())
    qk.save_adapter(whole, tmp_path / "a.safetensors")
    away = accelerate.cpu_offload(model(), offload_buffers=True)
    qk.load_adapter(away, tmp_path / "a.safetensors").eval()
    assert torch.equal(away(x()), whole.eval()(x()))
    qk.save_adapter(away, tmp_path / "b.safetensors")
    again = qk.load_adapter(model(), tmp_path / "b.safetensors").eval()
    assert torch.equal(again(x()), whole(x()))


def test_weights_that_come_with_their_parent_are_refused_by_name():
    model = accelerate.cpu_offload(nn.Sequential(net()), preload_module_classes=["Net"])
    with pytest.raises(ValueError, match=r"0\.up\.weight must hold data"):
        adapted(model)


def test_half_precision_head_that_is_away_trains_in_fp32(tmp_path):
    away = adapted(accelerate.cpu_offload(net().bfloat16()), trainable="head")
    assert away.head.weight.dtype == torch.float32
    away(x().bfloat16()).float().sum().backward()
    assert away.head.weight.grad is not None
    qk.unload(away, merge=False)
    assert away.head.weight.is_meta
    assert away.head.weight.dtype == torch.bfloat16
    assert torch.equal(away(x().bfloat16()), net().bfloat16()(x().bfloat16()))


def test_an_adapter_for_an_adapter_over_weights_that_are_away(tmp_path):
    whole = adapted(net(), "lora_xs")
    step(whole)
    qk.save_adapter(whole, tmp_path / "a.safetensors")
    away = adapted(accelerate.cpu_offload(net()), "qr")
    qk.load_adapter(away, tmp_path / "a.safetensors")
    assert torch.equal(away(x()), whole(x()))
    step(away)


def test_a_second_call_adds_to_the_first(tmp_path):
    away = accelerate.cpu_offload(net())
    qk.adapt(away, ["up"], rank=4, trainable="head.bias", progress=False)
    bias = away.head.bias
    qk.adapt(away, ["down"], rank=4, progress=False)
    assert away.head.bias is bias
    assert bias.requires_grad
    step(away)


def test_a_cast_keeps_what_trains():
    """A cast reaches what is in memory, and the rest is where accelerate keeps it."""
    away = adapted(accelerate.cpu_offload(net()))
    y = away(x())
    lam = away.up.lam
    away.to(torch.float32)
    assert torch.equal(away(x()), y)
    assert away.up.lam is lam


def test_a_plain_layer_of_an_offloaded_one_is_whole():
    away = adapted(accelerate.cpu_offload(net()))
    step(away)
    want = adapted(net())
    step(want)
    h = x()
    assert torch.equal(away.up.to_linear()(h), want.up.to_linear()(h))
    assert torch.equal(away.up.to_linear(merge=False)(h), net().up(h))


def test_hung_on_afterwards_refresh_and_load_take_the_adapter_back_in(tmp_path):
    whole = adapted(net(), trainable=())
    step(whole)
    qk.save_adapter(whole, tmp_path / "a.safetensors")
    for again in (qk.refresh, lambda m: qk.load_adapter(m, tmp_path / "a.safetensors")):
        model = accelerate.cpu_offload(adapted(net(), trainable=()))
        again(model)
        step(model)
        qk.unload(model, merge=False)
        remove_hook_from_submodules(model)
        assert torch.equal(model(x()), net()(x()))
    model = accelerate.cpu_offload(adapted(net(), trainable=()))
    qk.load_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(model.eval()(x()), whole(x()))


def test_hung_on_afterwards_it_is_taken_off_whole():
    model = accelerate.cpu_offload(adapted(net(), trainable=()))
    qk.unload(model, merge=False)
    assert torch.equal(model(x()), net()(x()))
    remove_hook_from_submodules(model)
    assert torch.equal(model(x()), net()(x()))
    assert not hasattr(model.up, "lam")


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_a_state_dict_into_weights_that_are_away_takes_the_adapter():
    whole = adapted(net(), trainable=())
    step(whole)
    away = adapted(accelerate.cpu_offload(net()), trainable=())
    away.load_state_dict(whole.state_dict())
    assert torch.equal(away(x()), whole(x()))
    assert not away.up.base_changed()
    other = adapted(accelerate.cpu_offload(net(seed=3)), trainable=())
    other.load_state_dict(whole.state_dict())
    assert other.up.base_changed()  # its weight stayed what it was, and the factors are another's
