"""Models whose weights accelerate keeps elsewhere live through everything that whole ones do.

The model that is all in memory says what is right, to the bit.
"""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from torch import nn
from torch.utils.checkpoint import checkpoint

import qrlora_kernels as qk

ADAPTERS: dict[str, dict[str, Any]] = {"qr": {"rank": 4}, "lora_xs": {"rank": 4}, "ohora": {}}
TARGETS = ["up", "down"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        self.checkpoints = False

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = checkpoint(self.block, x, use_reentrant=False) if self.checkpoints else self.block(x)
        return self.head(h)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def x() -> torch.Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def offloaded(how: str, folder: Any, model: Net | None = None) -> Net:
    model = net() if model is None else model
    if how == "cpu":
        return accelerate.cpu_offload(model)
    if how == "disk":
        return accelerate.disk_offload(model, str(folder / "weights"))
    if how == "dispatched":
        places = {"up": "cpu", "down": "disk", "head": "cpu"}
        return accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=str(folder / "weights")
        )
    for layer in (model.up, model.down):
        add_hook_to_module(layer, ModelHook())
    return accelerate.cpu_offload(model)  # behind the hooks that are there: in a sequence


HOW = ("cpu", "disk", "dispatched", "sequence")


def adapted(model: Net, adapter: str = "qr", trainable: Any = "head.bias") -> Net:
    torch.manual_seed(2)
    return qk.adapt(
        model, TARGETS, adapter, trainable=trainable, progress=False, **ADAPTERS[adapter]
    )


def step(model: Net) -> list[torch.Tensor]:
    """One step of training; what the optimizer's own parameters are then."""
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, lr=0.5)
    before = [p.detach().clone() for p in own]
    model.train()
    model(x()).square().sum().backward()
    optimizer.step()
    model.eval()
    for p, was in zip(own, before, strict=True):
        assert p.grad is not None
        assert torch.equal(p, was) == (not p.grad.any())  # OHoRA may start with a factor of zeros
    assert all(any(p is q for q in model.parameters()) for p in own)
    return [p.detach().clone() for p in own]


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
