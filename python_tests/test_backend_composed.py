"""The composition of library products keeps the contract, and the checks reject planted faults."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backend_contract import Contract, assert_within_bound, draw, small_update_gain, step

from qrlora_kernels.backends import composed
from qrlora_kernels.operands import LinearAdd


class TestComposed(Contract):
    backend = composed


def test_linear_add_rounds_once() -> None:
    op = draw("qr_linear", 4096, 192, 256, 16, torch.bfloat16, size=2e-4)
    addend = (0.7 * ((op.x @ op.frozen["r"].mT) * op.train["lam"]) @ op.frozen["q"].mT).clone()
    before = addend.clone()
    y = step(composed, LinearAdd(op.x, op.weight, op.bias, addend))
    assert small_update_gain(op, y) == pytest.approx(1, abs=0.02)
    assert torch.equal(addend, before)


def test_the_small_update_check_rejects_an_update_added_to_a_rounded_base() -> None:
    op = draw("qr_linear", 8192, 256, 256, 16, torch.bfloat16, size=2e-4)
    update = 0.7 * ((op.x @ op.frozen["r"].mT) * op.train["lam"]) @ op.frozen["q"].mT
    assert abs(small_update_gain(op, F.linear(op.x, op.weight, op.bias) + update) - 1) > 0.2


@pytest.mark.parametrize("key", ["y", "dx", "lam"])
def test_the_error_bound_rejects_a_planted_fault(key: str) -> None:
    op = draw("qr_linear", 64, 96, 80, 16, torch.float32)
    got = op.run(composed)
    got[key] = got[key].clone()
    got[key].view(-1)[3] += 0.01 * got[key].square().mean().sqrt()
    with pytest.raises(AssertionError, match=f"^{key.removeprefix('d')}: element"):
        assert_within_bound(op, got)
