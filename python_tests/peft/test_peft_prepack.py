"""A model of PEFT's own adapters, of which prepack takes what PEFT does not write into."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import qrlora_kernels as qk
from qrlora_kernels.nn.prepacked import PrepackedLinear


def test_a_merged_adapter_of_peft_is_in_the_answer() -> None:
    """It is added through ``weight.data``, which PyTorch counts as no write."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).requires_grad_(False)
    model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
    qk.prepack(model)
    prepacked = [name for name, m in model.named_modules() if isinstance(m, PrepackedLinear)]
    assert prepacked == ["base_model.model.2"]
    x = torch.randn(5, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), want, rtol=5e-2, atol=5e-2)
        with model.disable_adapter():
            assert not torch.allclose(model(x), want, rtol=5e-2, atol=5e-2)
