"""Over a base whose weight PEFT dequantises: a stand-in for the quantisers, which need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from peft_models import CONFIGS, config, move
from torch import Tensor, nn

from qrlora_kernels.peft import layer, start


class Eighths(nn.Linear):
    """Weights in int8, in steps of a sixteenth."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        data = (linear.weight.detach() * 16).round().to(torch.int8)
        self.weight = nn.Parameter(data, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float() / 16, self.bias)


class Backend:
    """What PEFT's quantisation backends offer."""

    def get_base_weight(self, base: Eighths) -> Tensor:
        return base.weight.float() / 16

    def set_base_weight(self, layer: Any, weight: Tensor) -> None:
        data = (weight * 16).round().to(torch.int8)
        layer.get_base_layer().weight = nn.Parameter(data, requires_grad=False)


@pytest.fixture(autouse=True)
def known_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(base: nn.Module, **kwargs: Any) -> Backend | None:
        return Backend() if isinstance(base, Eighths) else None

    for module in (layer, start):
        monkeypatch.setattr(module, "resolve_quantization_backend", resolve)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"one": Eighths(nn.Linear(24, 36))})


@pytest.mark.parametrize("adapter", CONFIGS)
def test_the_base_answers_and_the_update_is_added(adapter: str) -> None:
    model = get_peft_model(net(), config(adapter, target_modules=["one"]))
    one = model.get_base_model()["one"]
    x = torch.randn(3, 24)
    base = one.base_layer(x)
    torch.testing.assert_close(one(x), base, rtol=1e-5, atol=1e-6)
    move(model)
    want = base + x @ one.get_delta_weight("default").t()
    torch.testing.assert_close(one(x), want, rtol=1e-4, atol=1e-5)
    one(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("adapter", CONFIGS)
def test_merged_it_is_quantised_again_and_comes_back_as_it_was(adapter: str) -> None:
    model = get_peft_model(net(), config(adapter, target_modules=["one"]))
    move(model)
    one = model.get_base_model()["one"]
    weight = one.base_layer.weight
    held = weight.detach().clone()
    model.merge_adapter()
    assert one.base_layer.weight.dtype == torch.int8
    assert not torch.equal(one.base_layer.weight, held)
    model.add_adapter("other", config(adapter, target_modules=["one"]))
    assert len(one.factors_of._modules) == 1
    model.unmerge_adapter()
    assert one.base_layer.weight is weight
    assert torch.equal(weight, held)
