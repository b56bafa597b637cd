"""What lies between x and y may leave the range of fp16 where y does not: h, g, OHoRA's S and T.

A frozen layer whose outputs stay below 65,504 had NaN for every one of them under an adapter that
was not trained yet: h was infinite, and zero times infinity is NaN.
"""

from __future__ import annotations

import contextlib
import functools

import helpers
import pytest
import torch
from helpers import TRAINABLES
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels import functional, kernels
from qrlora_kernels.backends import use_backend

M, N, K, R = 9, 64, 64, 8
LIMIT = torch.finfo(torch.float16).max
OPS = ("qr_linear", "lora_xs_linear", "kron_linear")


def wide_between(op: str, trained: bool) -> tuple[helpers.Operands, Tensor]:
    """Operands of fp16 and a gradient whose inner products pass the range, y and dx far in it."""
    given = helpers.operands(op, M, N, K, R, torch.float16, change=1e-3)
    ones = torch.ones(M, K)
    given["x"] = (200 * ones).half()
    down = {"qr_linear": "r", "lora_xs_linear": "a"}.get(op)
    if down is not None:
        given[down] = torch.full((R, K), 10.0).half()  # h = 128,000
        up = "q" if op == "qr_linear" else "b"
        given[up] = (10 * torch.ones(N, R)).half()  # g = 128,000 for dy = 200
        gate = TRAINABLES[op][0]
        given[gate] = (1e-6 if trained else 0.0) * torch.ones_like(given[gate])
    else:
        for name in ("a", "b", "a0", "b0"):
            given[name] = torch.full_like(given[name], 50.0)  # S = 200 · 8 · 50 = 80,000
        if trained:
            given["a"] = given["a"] * (1 + 1e-3)
    return given, (200 * torch.ones(M, N)).half()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_the_case_is_one(op: str, trained: bool) -> None:
    """Something between passes the range, and nothing that comes out does."""
    given, dy = wide_between(op, trained)
    if op == "kron_linear":
        assert float((given["x"].float().view(M, R, -1) @ given["b"].float()).max()) > LIMIT
    else:
        down, up = ("r", "q") if op == "qr_linear" else ("a", "b")
        assert float((given["x"].float() @ given[down].float().mT).max()) > LIMIT
        assert float((dy.float() @ given[up].float()).max()) > LIMIT
    truth = helpers.in_fp64(op, given, dy)
    for name in ("y", "x"):
        assert float(truth[name].abs().max()) < LIMIT / 2


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_every_backend_stays_finite_and_right(op: str, trained: bool, autocast: bool) -> None:
    given, dy = wide_between(op, trained)
    truth = helpers.in_fp64(op, given, dy)
    if autocast:
        given = {n: t.float() if isinstance(t, Tensor) else t for n, t in given.items()}
    for backend in helpers.ways(op, torch.float16):
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            call = functools.partial(helpers.call, backend=backend)
            got = helpers.outcome(call, op, given, dy)
        for name in ("y", "x", *TRAINABLES[op]):
            error = float((got[name].double() - truth[name]).norm() / truth[name].norm())
            assert error < 2e-3, f"{name} on {backend}: {error}"


def test_h_is_of_fp32_over_fp16_alone() -> None:
    for dtype in helpers.DTYPES:
        given = helpers.operands("qr_linear", M, N, K, R, dtype)
        for backend in helpers.cpu_backends("qr_linear", dtype):
            _, h = kernels.qr_linear_fwd(*given.values(), 1.0, backend)
            assert h.dtype == (torch.float32 if dtype == torch.float16 else dtype)


@pytest.mark.parametrize("gate", ["vector", "core"])
def test_mixed_gates(gate: str) -> None:
    op = "qr_linear" if gate == "vector" else "lora_xs_linear"
    given, dy = wide_between(op, True)
    down, up = ("r", "q") if op == "qr_linear" else ("a", "b")
    one = given[TRAINABLES[op][0]]
    gates = torch.stack([one, 0 * one, one]).requires_grad_()
    x = given["x"].requires_grad_()
    index = torch.arange(M) % 3
    for backend in (None, "reference", "composed"):
        operands = (x, given["weight"], given["bias"], given[down], given[up], gates, index)
        y = functional.mixed_low_rank_linear(*operands, backend=backend)
        for t in (y, *torch.autograd.grad(y, (x, gates), dy)):
            assert bool(t.isfinite().all())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("adapter", ["qr", "lora_xs", "ohora"])
def test_an_untrained_layer_answers_as_the_frozen_one(adapter: str, training: bool) -> None:
    """With dropout the update goes another way."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 64).half()
    linear.weight.data.copy_(4 * torch.randn(64, 64))
    x = (400 * torch.randn(32, 64)).half()
    want = linear(x)
    assert 30_000 < float(want.abs().max()) < LIMIT
    options = {"init_std": 0.0} if adapter == "lora_xs" else {}
    model = nn.Sequential(linear)
    qk.adapt(model, ["0"], adapter=adapter, rank=8, dropout=0.5, progress=False, **options)
    model.train(training)
    for backend in (None, "composed", "reference"):
        with contextlib.nullcontext() if backend is None or training else use_backend(backend):
            got = model(x)
        torch.testing.assert_close(got.float(), want.float(), rtol=2e-3, atol=32.0)
