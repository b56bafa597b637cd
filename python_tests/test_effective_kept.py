"""W + ΔW kept from the forward to the backward: where, what it saves and costs, and who sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_contract import assert_within_bound
from cases import CORE, VECTOR, Kind, draw, step
from torch import Tensor

import qrlora_kernels as qk
from qrlora_kernels import backends
from qrlora_kernels.backends import composed
from qrlora_kernels.dispatch.contest import contest
from qrlora_kernels.dispatch.problem import Problem
from qrlora_kernels.ops import eager

N = K = 256
R, M = 64, 256
CPU = torch.device("cpu")
ITSELF = "composed:effective weight, kept"
needs_native = pytest.mark.skipif(not eager.AVAILABLE, reason="needs the native core's calls")


def recipe(**change: Any) -> str:
    problem = Problem("low_rank", CPU, torch.float32, M, N, K, R)
    return backends.choose(problem._replace(**change)).recipe


@pytest.mark.usefixtures("native_products_behind")
@pytest.mark.parametrize("gate", ["vector", "core"])
def test_it_is_taken_for_a_large_rank_from_as_many_tokens_as_features(gate: str) -> None:
    assert recipe(gate=gate) == composed.KEPT
    assert recipe(gate=gate, m=8 * M) == composed.KEPT
    assert recipe(gate=gate, m=M - 1) == "addmm"
    assert recipe(gate=gate, r=R - 1) == "addmm"
    assert recipe(gate=gate, r=R - 1, m=2 * M) == composed.EFFECTIVE


@pytest.mark.usefixtures("native_products_behind")
@pytest.mark.parametrize(
    ("n", "k", "least"), [(512, 256, 342), (256, 512, 512), (128, 1024, 1024), (1024, 128, 228)]
)
def test_what_is_kept_is_at_most_half_of_x_and_y(n: int, k: int, least: int) -> None:
    assert least * (n + k) >= 2 * n * k
    assert recipe(n=n, k=k, r=128, m=least) == composed.KEPT
    assert recipe(n=n, k=k, r=128, m=least - 1) == "addmm"


@pytest.mark.parametrize(
    "change",
    [
        {"step": "bwd"},  # who asks for a backward alone hands nothing on
        {"n": 128, "k": 256},  # a small layer saves h alone, as small layers did
        {"dtype": torch.bfloat16},
        {"gate": "mixed_vector"},
        {"gate": "mixed_core"},
        {"form": "output"},
    ],
    ids=str,
)
def test_it_is_not_taken_elsewhere(change: dict[str, Any]) -> None:
    assert recipe(**change) != composed.KEPT


@pytest.mark.parametrize("kind", [VECTOR, CORE], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_within_the_bound(kind: Kind, dtype: torch.dtype) -> None:
    case = draw(kind, M, N, K, R, dtype)
    y, h, effective = step(composed, case.p, composed.KEPT)
    gradient = case.gradient(h, True, True)._replace(weight=effective)
    dx, dgate = step(composed, gradient, composed.KEPT)
    assert_within_bound(case, {"y": y, "x": dx, "gate": dgate})


def operands(x_trains: bool = True) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x, weight, q, r, lam = (
        torch.randn(*shape) / shape[-1] ** 0.5 for shape in ((M, K), (N, K), (N, R), (R, K), (R,))
    )
    return x.requires_grad_(x_trains), weight, q, r, lam.requires_grad_()


def saved_numbers(x_trains: bool) -> int:
    """Numbers saved for the backward beside the operands."""
    x, weight, q, r, lam = operands(x_trains)
    own = {t.data_ptr() for t in (x, weight, q, r, lam)}
    fresh = []

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            fresh.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        qk.functional.qr_linear(x, weight, None, q, r, lam)
    return sum(t.numel() for t in fresh)


@needs_native
def test_it_is_saved_beside_h_and_only_for_dx() -> None:
    assert saved_numbers(x_trains=True) == M * R + N * K
    assert saved_numbers(x_trains=False) == M * R


def gradients(*trains: Tensor, backend: str | None = None, **how: Any) -> tuple[Tensor, ...]:
    x, weight, q, r, lam = trains
    y = qk.functional.qr_linear(x, weight, None, q, r, lam, backend=backend)
    dy = torch.cos(torch.arange(N * M, dtype=torch.float32)).view(M, N)
    return torch.autograd.grad(y, (x, lam), dy, **how)


@needs_native
def test_both_steps_say_that_they_took_it() -> None:
    gradients(*operands())
    for one in ("fwd", "bwd"):
        assert backends.last_choice("qr_linear", one).recipe == composed.KEPT


def test_gradients_are_those_of_the_update_by_itself() -> None:
    kept = gradients(*operands())
    for one, other in zip(kept, gradients(*operands(), backend="composed:addmm"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    again = gradients(*operands())
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_asked_for_by_name_the_operator_hands_nothing_on() -> None:
    x, weight, q, r, lam = operands()
    y = qk.functional.qr_linear(x, weight, None, q, r, lam, backend=ITSELF)
    y.sum().backward()
    assert backends.last_choice("qr_linear", "fwd").recipe == composed.KEPT
    assert backends.last_choice("qr_linear", "bwd").recipe == "addmm"
    kept = qk.functional.qr_linear(*operands()[:2], None, *operands()[2:])
    assert torch.equal(y, kept)


@pytest.mark.parametrize("name", ["weight", "lam"])
def test_a_write_between_the_steps_is_an_error_as_ever(name: str) -> None:
    x, weight, q, r, lam = operands()
    y = qk.functional.qr_linear(x, weight, None, q, r, lam)
    with torch.no_grad():
        {"weight": weight, "lam": lam}[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused() -> None:
    x, weight, q, r, lam = operands()
    y = qk.functional.qr_linear(x, weight, None, q, r, lam)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_batch_of_gradients_goes_its_own_way() -> None:
    x, weight, q, r, lam = operands()
    y = qk.functional.qr_linear(x, weight, None, q, r, lam)
    dys = torch.stack([torch.ones_like(y), -torch.ones_like(y)])
    dx, dlam = torch.autograd.grad(y, (x, lam), dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        wanted = torch.autograd.grad(y, (x, lam), dy, retain_graph=True)
        for got, want in zip((dx[i], dlam[i]), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_leading_dimensions_come_back() -> None:
    x, weight, q, r, lam = operands()
    y = qk.functional.qr_linear(x.view(4, M // 4, K), weight, None, q, r, lam)
    dx, dlam = torch.autograd.grad(y, (x, lam), torch.ones_like(y))
    assert (dx.shape, dlam.shape) == ((M, K), (R,))


def test_a_compiled_call_takes_the_same_forward() -> None:
    x, weight, q, r, lam = operands()
    compiled = torch.compile(qk.functional.qr_linear, backend="aot_eager", fullgraph=True)
    y = compiled(x, weight, None, q, r, lam)
    assert torch.equal(y, qk.functional.qr_linear(x, weight, None, q, r, lam))
    dx, dlam = torch.autograd.grad(y, (x, lam), torch.ones_like(y))
    assert dx.isfinite().all()
    assert dlam.isfinite().all()


def test_tune_times_it_among_the_others() -> None:
    found = contest(Problem("qr_linear", CPU, torch.float32, M, N, K, R), 0.01)
    assert ITSELF in found.seconds
    assert not any(name.startswith("composed") for name in found.left_out)
