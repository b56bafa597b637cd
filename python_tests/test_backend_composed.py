"""The composition of library products keeps the contract, and the checks reject planted faults."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backend_contract import Contract, assert_within_bound, small_update_gain
from cases import CORE, LOW_RANK, MIXED_CORE, MIXED_VECTOR, VECTOR, Case, Kind, draw, step
from torch import Tensor

from qrlora_kernels.backends import composed, products
from qrlora_kernels.backends.products import ADDMM, FP32
from qrlora_kernels.dispatch.problem import problem_of
from qrlora_kernels.dispatch.rules import passed_over
from qrlora_kernels.operands import LinearAdd


class TestComposed(Contract):
    backend = composed


def _update(case: Case) -> Tensor:
    p = case.p
    return p.scaling * ((p.x @ p.down.mT) * p.gate) @ p.up.mT


def test_linear_add_rounds_once() -> None:
    case = draw(VECTOR, 4096, 192, 256, 16, torch.bfloat16, size=2e-4)
    addend = _update(case)
    before = addend.clone()
    y = step(composed, LinearAdd(*case.p[:3], addend))
    assert small_update_gain(case, y) == pytest.approx(1, abs=0.02)
    assert torch.equal(addend, before)


def test_the_small_update_check_rejects_an_update_added_to_a_rounded_base() -> None:
    case = draw(VECTOR, 8192, 256, 256, 16, torch.bfloat16, size=2e-4)
    y = F.linear(*case.p[:3]) + _update(case)
    assert abs(small_update_gain(case, y) - 1) > 0.2


@pytest.mark.parametrize("kind", LOW_RANK, ids="-".join)
@pytest.mark.parametrize("name", ["y", "x", "gate"])
def test_the_error_bound_rejects_a_planted_fault(name: str, kind: Kind) -> None:
    case = draw(kind, 64, 96, 80, 16, torch.float32)
    got = case.run(composed)
    assert_within_bound(case, got)
    got[name] = got[name].clone()
    got[name].view(-1)[3] += 0.01 * got[name].square().mean().sqrt()
    with pytest.raises(AssertionError, match=f"^{name}: element"):
        assert_within_bound(case, got)


@pytest.mark.parametrize("kind", [MIXED_VECTOR, MIXED_CORE], ids="-".join)
def test_the_error_bound_rejects_the_gate_of_another_row(kind: Kind) -> None:
    """And the gradient of one adapter given to another, and any at all to one in no row."""
    case = draw(kind, 64, 96, 80, 16, torch.float32)
    index = case.p.index.clone()
    index[7] = (index[7] + 1) % 4
    got, wrong = case.run(composed), case.given(index=index).run(composed)
    absent = got["gate"].clone()
    absent[-1] += 1e-6
    for name, fault in {"y": wrong["y"], "x": wrong["x"], "gate": wrong["gate"]}.items():
        with pytest.raises(AssertionError, match=f"^{name}: element"):
            assert_within_bound(case, got | {name: fault})
    with pytest.raises(AssertionError, match=r"^gate: element"):
        assert_within_bound(case, got | {"gate": absent})


@pytest.mark.parametrize("kind", [VECTOR, CORE], ids="-".join)
def test_the_error_bound_rejects_factors_read_beyond_the_gate(kind: Kind) -> None:
    """A result of factors that hold numbers there, of which one more column was taken."""
    case = draw(kind, 64, 96, 80, 16, torch.float32)
    wide = draw(kind, 64, 96, 80, 17, torch.float32)
    more = wide.given(
        x=case.p.x, weight=case.p.weight, bias=case.p.bias, dy=case.dy,
        up=torch.cat([case.p.up, wide.p.up[:, 16:]], 1),
        down=torch.cat([case.p.down, wide.p.down[16:]], 0),
    )  # fmt: skip
    inside = (slice(0, 16),) * case.p.gate.dim()
    more.p.gate[inside] = case.p.gate
    wrong = more.run(composed)
    with pytest.raises(AssertionError, match=r"^y: element"):
        assert_within_bound(case, case.run(composed) | {"y": wrong["y"]})


@pytest.mark.parametrize("kind", [VECTOR, CORE, MIXED_VECTOR, MIXED_CORE], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_products_of_halves_a_step_is_one_of_fp32(
    kind: Kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the tokens on that pay for the casts; with a bias always, for its one rounding."""
    case = draw(kind, 64, 96, 80, 16, dtype).given(bias=None)
    y, h = step(composed, case.p, FP32)
    dx, dgate = step(composed, case.gradient(h, True, True), FP32)
    assert (y.dtype, dx.dtype, dgate.dtype) == (dtype, dtype, case.p.gate.dtype)
    assert_within_bound(case, {"y": y, "x": dx, "gate": dgate})
    monkeypatch.setattr(products, "multiplies", lambda device, dtype: False)
    for problem in map(problem_of, (case.p, case.gradient(h, True, True))):
        assert [recipe.name for recipe in composed.supports(problem)] == [FP32, ADDMM]
        assert passed_over("composed", FP32, problem) is None
        assert passed_over("composed", FP32, problem._replace(m=3)) is not None
    biased = problem_of(case.p)._replace(m=3, bias=True)
    assert [recipe.name for recipe in composed.supports(biased)] == [FP32]
    assert passed_over("composed", FP32, biased) is None
