"""A model that is cast between forward and backward: refused, and no number read as another type.

``model.half()`` writes through ``.data``, which PyTorch's count of writes does not see.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qrlora_kernels as qk

ADAPTERS = [
    ("qr", {"rank": 7}),
    ("qr", {"rank": 7, "factors": "output"}),
    ("lora_xs", {"rank": 7}),
    ("ohora", {"rank": 4}),
]


@pytest.mark.parametrize("tokens", [9, 200], ids=["few tokens", "many"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("adapter", "options"), ADAPTERS, ids=str)
def test_a_cast_before_the_backward(
    adapter: str, options: dict[str, Any], dtype: torch.dtype, tokens: int
) -> None:
    model = nn.Sequential(nn.Linear(40, 48))
    qk.adapt(model, ["0"], adapter=adapter, progress=False, **options)
    y = model(torch.randn(tokens, 40, requires_grad=True))
    model.to(dtype)
    with pytest.raises(RuntimeError, match=r"weight must be of the forward's dtype, torch\.f"):
        y.sum().backward()


def test_back_in_the_dtype_of_the_forward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48))
    qk.adapt(model, ["0"], rank=7, progress=False)
    x = torch.randn(9, 40, requires_grad=True)
    (want,) = torch.autograd.grad(model(x).sum(), x)
    y = model(x)
    model.double().float()
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("name", ["q", "r"])
def test_a_factor_that_is_cast_before_the_backward(name: str) -> None:
    x, weight = torch.randn(9, 40, requires_grad=True), torch.randn(48, 40)
    factors = {"q": torch.randn(48, 7), "r": torch.randn(7, 40)}
    y = qk.functional.qr_linear(x, weight, None, **factors, lam=torch.ones(7))
    factors[name].data = factors[name].half()
    with pytest.raises(RuntimeError, match=r"must be of the forward's dtype, torch\.float32"):
        y.sum().backward()
