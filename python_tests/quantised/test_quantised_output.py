"""QR-LoRA with factors="output" over quantised weights: h is made of the dense one's product."""

from __future__ import annotations

import pytest
import torch
from quantised_models import adapted, move, of_each_kind, x


@of_each_kind
def test_it_is_the_adapter_of_two_factors_up_to_rounding(kind):
    results = []
    for factors in ("both", "output"):
        _, layer = adapted(kind, "qr", torch.float32, factors=factors)
        move(layer)
        rows = x(torch.float32).requires_grad_()
        y = layer(rows)
        y.square().sum().backward()
        found = y, rows.grad, layer.lam.grad, layer.delta_weight()
        results.append([t.detach() for t in found])
    assert layer.r is None
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


@of_each_kind
def test_one_that_stands_for_half_precision_is_refused(kind):
    if kind == "bnb_int8":
        pytest.skip("it does not know what it was made of, and stands for fp32")
    with pytest.raises(ValueError, match="must be float32 or float64 with factors='output'"):
        adapted(kind, "qr", torch.bfloat16, factors="output")
