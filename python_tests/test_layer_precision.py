"""Small updates survive in every path that a layer may take, in bf16 and under autocast."""

from __future__ import annotations

import helpers
import pytest
import torch
from test_layers import trained
from torch import nn

FORMS = {
    "qr": ("qr", {}),
    "qr dropout": ("qr", {"dropout": 1e-9}),
    "lora_xs": ("lora_xs", {}),
    "lora_xs dropout": ("lora_xs", {"dropout": 1e-9}),
    "ohora": ("ohora", {}),
    "ohora dropout": ("ohora", {"dropout": 1e-9}),
    "ohora lora": ("ohora", {"product": "lora"}),
    "ohora materialised": ("ohora", {"product": "materialised"}),
    "ohora fold": ("ohora", {"fold": True}),
}


@pytest.mark.parametrize(
    ("form", "autocast"),
    # The fold is refused in bf16, which has its own test.
    [
        (form, autocast)
        for form in FORMS
        for autocast in (False, True)
        if autocast or "fold" not in form
    ],
)
def test_small_updates_survive_in_every_form(form, autocast):
    """‖ΔW‖/‖W‖ = 1e-4 through the module, in bf16 or under autocast: gain 1 ± 0.02."""
    kind, options = FORMS[form]
    torch.manual_seed(0)
    linear = nn.Linear(256, 512).to(torch.float32 if autocast else torch.bfloat16)
    layer = trained(kind, linear, size=1e-3, **options).train()
    _shrink(layer, 1e-4)
    x = torch.randn(8192, 256).to(linear.weight.dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        adapted, plain = layer(x), linear(x)
    update = x.bfloat16().float() @ layer.delta_weight().float().T
    assert adapted.dtype == torch.bfloat16
    assert helpers.update_gain(adapted, plain, update) == pytest.approx(1.0, abs=0.02)


@torch.no_grad()
def _shrink(layer, size):
    """Scale what was learned until ‖ΔW‖/‖W‖ is ``size``."""
    for _ in range(4):
        ratio = size * layer.weight.float().norm() / layer.delta_weight().float().norm()
        for name in layer.trainables:
            start = getattr(layer, f"{name}0", torch.zeros(()))
            parameter = getattr(layer, name)
            parameter.copy_(start + ratio * (parameter - start))


@pytest.mark.parametrize("options", [{"dropout": 1e-9}, {"product": "lora"}], ids=str)
def test_ohora_subtracts_its_start_in_fp32_under_autocast(options):
    """Each product alone is ten thousand times the update: in bf16 the difference is noise."""
    torch.manual_seed(0)
    layer = trained("ohora", nn.Linear(256, 512, bias=False), size=1e-3, **options).train()
    _shrink(layer, 1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.weight.zero_()
        x = torch.randn(64, 256)
        got = layer(x).float()
    want = x @ layer.delta_weight().T
    assert float((got - want).norm() / want.norm()) < 0.01
