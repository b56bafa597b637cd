"""Unbiased rounding: what a merge into half precision keeps of a small update (contract 2)."""

import pytest
import torch
from torch import nn

import qrlora_kernels as qk
from qrlora_kernels.nn.rounding import round_unbiased

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
def test_each_value_goes_to_a_neighbour(dtype):
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    values[:4] = torch.tensor([0.0, 1e-9, -1e-9, 1.0])
    out = round_unbiased(values, dtype).float()
    spacing = (values.abs() * torch.finfo(dtype).eps).clamp(min=torch.finfo(dtype).tiny)
    assert ((out - values).abs() <= spacing).all()
    exact = values.to(dtype)
    assert torch.equal(round_unbiased(exact.float(), dtype), exact)


@pytest.mark.parametrize("dtype", HALF)
def test_the_mean_is_kept_and_to_nearest_loses_it(dtype):
    weight = torch.randn(400_000, generator=torch.Generator().manual_seed(1)).to(dtype).float()
    delta = 1e-4 * torch.randn(400_000, generator=torch.Generator().manual_seed(2))

    def gain(rounded):
        return float(((rounded.float() - weight) * delta).sum() / delta.square().sum())

    assert gain(round_unbiased(weight + delta, dtype)) == pytest.approx(1.0, abs=0.05)
    if dtype is torch.bfloat16:
        assert gain((weight + delta).to(dtype)) < 0.2


def test_same_seed_same_bits():
    values = torch.randn(1000)
    assert torch.equal(
        round_unbiased(values, torch.bfloat16, 3), round_unbiased(values, torch.bfloat16, 3)
    )
    assert not torch.equal(
        round_unbiased(values, torch.bfloat16, 3), round_unbiased(values, torch.bfloat16, 4)
    )


def test_fault_18_a_bf16_merge_keeps_a_small_update():
    torch.manual_seed(0)
    layer = qk.QRLinear.from_linear(nn.Linear(512, 512).bfloat16(), rank=64)
    with torch.no_grad():
        layer.lam.normal_()
        layer.lam.mul_(1e-4 * layer.weight.float().norm() / layer.delta_weight().norm())
    delta, base = layer.delta_weight(), layer.weight.float()
    layer.merge()
    kept = float(((layer.weight.float() - base) * delta).sum() / delta.square().sum())
    assert kept == pytest.approx(1.0, abs=0.1)
