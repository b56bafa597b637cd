"""The output form: h made of x Wᵀ, for factors without a second side."""

from __future__ import annotations

import pytest
import torch
from cases import LOW_RANK, Case, Kind, draw
from torch import Tensor

from qrlora_kernels import backends, kernels
from qrlora_kernels.ops.low_rank import LowRankFunction

OUTPUT = pytest.mark.parametrize("kind", LOW_RANK[4:], ids=lambda kind: kind.gate)
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
REASON = r"the output form needs a kernel that keeps x Wᵀ in fp32 until h is made"


def steps(case: Case, backend: str | None) -> dict[str, Tensor]:
    """y, h and the gradients by the steps of ``kernels``."""
    x, weight, bias, up, down, gate, index, scaling = case.p
    y, h = kernels.low_rank_fwd(x, weight, bias, up, down, gate, index, scaling, backend)
    dx, dgate = kernels.low_rank_bwd(
        case.dy, weight, up, down, gate, index, h, scaling, True, True, backend
    )
    return {"y": y, "h": h, "dx": dx, "dgate": dgate}


@OUTPUT
@pytest.mark.parametrize("backend", [None, "reference", "composed"])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_two_sided_form_with_down_of_the_weight(
    bias: bool, backend: str | None, kind: Kind
) -> None:
    """down = upᵀ W; so the bias has no part in h."""
    case = draw(kind, 9, 24, 40, 6, torch.float64, bias=bias, wide=3)
    two_sided = case.given(down=case.p.up.mT @ case.p.weight)
    got, want = steps(case, backend), steps(two_sided, "reference")
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


@OUTPUT
@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_gradcheck(backend: str, kind: Kind) -> None:
    case = draw(kind, 6, 7, 5, 3, torch.float64)
    _, weight, _, up, down, _, index, scaling = case.p
    assert down is None

    def f(x: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        y: Tensor = LowRankFunction.apply(
            x, weight, bias, up, None, gate, index, scaling, backend, None
        )
        return y

    leaves = [t.clone().requires_grad_() for t in (case.p.x, case.p.bias, case.p.gate)]
    assert torch.autograd.gradcheck(f, leaves)


@OUTPUT
@HALF
def test_half_precision_is_refused_where_the_base_would_be_rounded_first(
    dtype: torch.dtype, kind: Kind
) -> None:
    """In either step, by name; nobody's choice is the reference, which says why."""
    case = draw(kind, 9, 24, 40, 6, dtype)
    x, weight, bias, up, down, gate, index, scaling = case.p
    with pytest.raises(ValueError, match=REASON):
        kernels.low_rank_fwd(x, weight, bias, up, down, gate, index, scaling, "composed")
    got = steps(case, None)
    for step in ("fwd", "bwd"):
        choice = backends.last_choice("low_rank", step)
        assert choice.name == "reference"
        assert f"not composed: {REASON}" in choice.reason
    rest = (weight, up, down, gate, index, got["h"], scaling, True, True)
    with pytest.raises(ValueError, match=REASON):
        kernels.low_rank_bwd(case.dy, *rest, "composed")


@OUTPUT
@pytest.mark.parametrize("backend", ["cpu", "amx", "triton", "cuda"])
def test_a_backend_without_a_kernel_for_it_refuses(backend: str, kind: Kind) -> None:
    case = draw(kind, 9, 24, 40, 6, torch.float32)
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run"):
        steps(case, backend)


@OUTPUT
def test_an_update_that_the_rounded_base_would_lose_is_kept_in_h(kind: Kind) -> None:
    """In bf16, where x Wᵀ is so large that its rounding is as large as h."""
    case = draw(kind, 64, 24, 40, 6, torch.bfloat16)
    x, weight, up = case.p.x, case.p.weight, case.p.up
    # Directions in which x Wᵀ nearly cancels: up is orthogonal to all but the last of them.
    base = x.double() @ weight.double().mT
    left = torch.linalg.svd(base.float(), full_matrices=False).Vh[-6:].mT
    case = case.given(up=left.bfloat16().contiguous().view_as(up))
    exact = base @ case.p.up.double()
    rounded = base.bfloat16().double() @ case.p.up.double()
    h = steps(case, None)["h"].double()
    assert (h - exact).norm() < 0.02 * (rounded - exact).norm() + 2**-8 * exact.norm()
