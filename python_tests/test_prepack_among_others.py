"""Prepacked layers under what other code does to them, or expects of them."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

import qrlora_kernels as qk
from qrlora_kernels.nn.prepacked import PrepackedLinear


def model(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layers or (nn.Linear(16, 8), nn.Linear(8, 8)))).requires_grad_(False)


def call(module: nn.Module, features: int = 16) -> Tensor:
    x = torch.linspace(-1, 1, 3 * features).view(3, features)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y: Tensor = module(x)
    return y


def kept(layer: nn.Module) -> bool:
    return bool(vars(layer)["derived"].nbytes())


def hang(layer: nn.Module) -> None:
    """As accelerate hangs a hook on a layer."""
    before = layer.forward
    vars(layer)["_old_forward"] = before
    vars(layer)["_hf_hook"] = object()
    vars(layer)["forward"] = MethodType(lambda self, x: self._old_forward(x), layer)


def test_a_hook_of_accelerate_hung_on_since_calls_the_plain_layer_again() -> None:
    net = qk.prepack(model())
    hang(net.get_submodule("0"))
    want = call(net)
    torch.testing.assert_close(call(qk.prepack(net, False)), want, rtol=2e-2, atol=2e-2)


def test_a_hook_of_accelerate_from_before_calls_the_prepacked_layer() -> None:
    net = model()
    hang(net[0])
    call(qk.prepack(net))
    assert kept(net[0])
    assert vars(net[0])["_old_forward"].__func__ is type(net[0]).forward


def test_a_conv1d_is_called_by_the_name_of_its_argument() -> None:
    layer = qk.prepack(model(Conv1D(8, 16))).get_submodule("0")
    assert isinstance(layer, PrepackedLinear)
    x = torch.randn(3, 16)
    assert torch.equal(layer(x=x), layer(x))


def test_a_state_dict_is_loaded_by_swapping() -> None:
    net = qk.prepack(model())
    call(net)
    state = {name: 2 * tensor for name, tensor in net.state_dict().items()}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    other = model()
    other.load_state_dict(state)
    assert torch.equal(call(net), call(qk.prepack(other)))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_class_on_top_is_taken_off_first_and_nothing_has_changed() -> None:
    net = qk.prepack(model())
    parametrize.register_parametrization(net.get_submodule("1"), "weight", Doubled())
    want, kinds = call(net), [type(module) for module in net.modules()]
    with pytest.raises(
        TypeError, match=r"1 must have the class that prepack gave it.*Parametrized"
    ):
        qk.prepack(net, False)
    assert [type(module) for module in net.modules()] == kinds
    assert torch.equal(call(net), want)
    parametrize.remove_parametrizations(net.get_submodule("1"), "weight")
    qk.prepack(net, False)
    assert [type(module) for module in net.children()] == [nn.Linear] * 2


def test_a_copy_has_the_class_that_stands_on_top() -> None:
    layer = qk.prepack(model()).get_submodule("0")
    layer.__class__ = type("OnTop", (type(layer),), {})
    assert type(copy.deepcopy(layer)) is type(layer)


def test_it_is_scripted_as_a_plain_layer() -> None:
    net = qk.prepack(model())
    x = torch.randn(3, 16)
    want = net(x)
    assert torch.equal(torch.jit.script(net)(x), want)


class OfItsOwn(nn.Linear):
    def over(self) -> int:
        return 7

    @property
    def derived(self) -> int:
        return 3


def test_a_layer_with_names_that_would_be_hidden_is_left() -> None:
    net = qk.prepack(model(OfItsOwn(16, 8), nn.Linear(8, 8)))
    layer = net.get_submodule("0")
    call(net)
    assert isinstance(layer, OfItsOwn)
    assert not isinstance(layer, PrepackedLinear)
    assert (layer.over(), layer.derived) == (7, 3)


def test_a_layer_with_two_names_is_taken_up_and_off_once() -> None:
    linear = nn.Linear(16, 16)
    net = qk.prepack(model(linear, linear))
    assert vars(type(linear))["over"] is nn.Linear
    call(net)
    qk.prepack(net, False)
    assert type(linear) is nn.Linear


def test_a_write_that_is_not_counted_is_seen_after_prepack_again() -> None:
    net = qk.adapt(model(), ["0"], "qr", rank=2, progress=False)
    call(qk.prepack(net))
    for name in ("0", "1"):
        net.get_submodule(name).weight.data.mul_(2)
    want = call(qk.prepack(copy.deepcopy(net)))
    assert torch.equal(call(qk.prepack(net)), want)


def test_a_merged_layer_keeps_its_merged_weight() -> None:
    net = qk.prepack(qk.adapt(model(), ["0"], "qr", rank=2, progress=False))
    call(net)
    qk.merge(net)
    call(net)
    assert kept(net.get_submodule("0"))
