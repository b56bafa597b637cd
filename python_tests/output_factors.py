"""What the tests of factors="output" share: the same adapter in both forms."""

from __future__ import annotations

import pytest
import torch
from saved import base, moved
from torch import Tensor, nn

WIDE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
KEPT = ("q", "pivots", "diagonal")  # of the factors


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, nn.Sequential]:
    """The same adapter with two factors and with one."""
    return moved("qr", base(dtype)), moved("qr", base(dtype), factors="output")


def close(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> None:
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * float(want.detach().abs().max()))


def trained_by(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """y, dx and every dλ of a sum of squares."""
    rows = x.clone().requires_grad_()
    y = model(rows)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "dx": rows.grad} | grads
