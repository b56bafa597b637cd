"""A forward on one backend and its backward on another: gradients are right for every pair.

What a forward saves (h [M, r] above all) must be good for any backend's backward, and which backend
that is follows two rules:

- a backend that is asked for, by argument, ``use_backend`` or ``QRLORA_BACKEND``, runs the backward
  of its forward too, whatever is asked for then;
- the backward of a forward that was free is free, or what is asked for when it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import golden_bits
import helpers
import pytest
import torch
from golden_bits import SCALING, TRAINED, Operands
from torch import Tensor

from qrlora_kernels import functional, kernels
from qrlora_kernels.backends import Problem, composed, last_choice, use_backend
from qrlora_kernels.operands import LowRank, LowRankGradient

OPS = ("qr_linear", "lora_xs_linear", "kron_linear")
SHAPE = (7, 32, 48, 8)
# What the interpreter of Triton can run, on a CPU.
DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("reference", "composed", "cpu", "amx", "triton")


pytestmark = pytest.mark.usefixtures("interpreted")


def supporting(op: str, dtype: torch.dtype) -> list[str]:
    problem = Problem(op, torch.device("cpu"), dtype, *SHAPE)
    return [name for name in BACKENDS if helpers.supports(name, problem)]


def problem(op: str, dtype: torch.dtype) -> tuple[Operands, Tensor]:
    return golden_bits.operands(golden_bits.Case(op, "free", dtype, "rows", SHAPE, 1))


def forward(op: str, dtype: torch.dtype, **options: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    """y, what it is to be derived by, and dy."""
    given, dy = problem(op, dtype)
    leaves = [given[name].requires_grad_() for name in ("x", *TRAINED[op])]
    return getattr(functional, op)(**given, scaling=SCALING, **options), leaves, dy


def exact(op: str, dtype: torch.dtype) -> list[Tensor]:
    """The gradients of x and of what trains, by autograd through the dense weight in fp64."""
    given, dy = problem(op, dtype)
    wide = {name: t.double() for name, t in given.items()}
    leaves = [wide[name].requires_grad_() for name in ("x", *TRAINED[op])]
    weight = wide["weight"] + SCALING * _delta(op, wide)
    return list(torch.autograd.grad(wide["x"] @ weight.mT, leaves, dy.double()))


def _delta(op: str, t: Operands) -> Tensor:
    if op == "qr_linear":
        return (t["q"] * t["lam"]) @ t["r"]
    if op == "lora_xs_linear":
        return t["b"] @ t["core"].mT @ t["a"]
    return _kron(t["a"], t["b"]) - _kron(t["a0"], t["b0"])


def _kron(a: Tensor, b: Tensor) -> Tensor:
    return torch.kron(a, b.mT.contiguous())


def check_gradients(op: str, dtype: torch.dtype, gradients: list[Tensor]) -> None:
    """Within few units of the computing dtype, in the norm.

    Two in half precision, where h and g are rounded once each and sums are fp32; in fp32 the sums'
    own roundings weigh more.
    """
    limit = (16 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    names = ("dx", *TRAINED[op])
    for name, got, want in zip(names, gradients, exact(op, dtype), strict=True):
        error = float((got.double() - want).norm() / want.norm())
        assert error <= limit, f"{name} is off by {error:.1e} of its norm, allowed {limit:.1e}"


Environment = Callable[[str | None], None]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """Sets ``QRLORA_BACKEND``, or takes it away."""

    def set_to(name: str | None) -> None:
        if name is None:
            monkeypatch.delenv("QRLORA_BACKEND", raising=False)
        else:
            monkeypatch.setenv("QRLORA_BACKEND", name)

    return set_to


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_pair(
    op: str, dtype: torch.dtype, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is not remembered, so that the backward may have another."""
    names = supporting(op, dtype)
    assert {"reference", "composed"} <= set(names)
    for module in ("low_rank", "kron"):
        monkeypatch.setattr(f"qrlora_kernels.ops.{module}.pinned_backend", lambda backend: None)
    for first in names:
        environment(first)
        y, leaves, dy = forward(op, dtype)
        assert last_choice(op).name == first
        environment(None)
        for second in names:
            with use_backend(second):
                gradients = list(torch.autograd.grad(y, leaves, dy, retain_graph=True))
            assert last_choice(op).name == second
            check_gradients(op, dtype, gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_free_forward_and_every_backward(op: str, dtype: torch.dtype) -> None:
    """Where the forward is one native call, h is its own; free backwards come last."""
    y, leaves, dy = forward(op, dtype)
    for name in (*supporting(op, dtype), None):
        with contextlib.nullcontext() if name is None else use_backend(name):
            gradients = list(torch.autograd.grad(y, leaves, dy, retain_graph=True))
        assert name in (None, last_choice(op).name)
        check_gradients(op, dtype, gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["qr_linear", "lora_xs_linear"])
def test_h_may_be_a_part_of_something_wider(op: str, dtype: torch.dtype) -> None:
    """h [M, r] with unit column stride and any row stride, from any backend to any other."""
    given, dy = problem(op, dtype)
    names = helpers.OPERANDS[op]
    operands = [given[name] for name in ("x", "weight", "bias", *names)]
    for first in supporting(op, dtype):
        _, h = getattr(kernels, f"{op}_fwd")(*operands, SCALING, first)
        assert h.stride(1) == 1
        wide = torch.cat([h, h * torch.nan], 1)[:, : h.shape[1]]
        for second in supporting(op, dtype):
            backward = getattr(kernels, f"{op}_bwd")
            rest = [given["weight"], *(given[name] for name in names), wide]
            gradients = backward(dy, *rest, SCALING, True, True, second)
            check_gradients(op, dtype, list(gradients))


# --- who runs the backward


@pytest.mark.parametrize("op", OPS)
def test_asked_for_in_code_is_pinned(op: str, environment: Environment) -> None:
    for by_argument in (True, False):
        environment(None)
        if by_argument:
            y, leaves, dy = forward(op, torch.float32, backend="reference")
        else:
            with use_backend("reference"):
                y, leaves, dy = forward(op, torch.float32)
        environment("composed")
        with use_backend("composed"):
            torch.autograd.grad(y, leaves, dy)
        assert last_choice(op).name == "reference"


@pytest.mark.parametrize("op", OPS)
def test_asked_for_by_the_environment_is_pinned(op: str, environment: Environment) -> None:
    """The variable is gone or says something else when the backward runs."""
    for later in (None, "composed"):
        environment("reference")
        y, leaves, dy = forward(op, torch.float32)
        environment(later)
        torch.autograd.grad(y, leaves, dy)
        assert last_choice(op).name == "reference"
        assert last_choice(op, "bwd").name == "reference"


@pytest.mark.parametrize("op", OPS)
def test_a_free_forward_has_the_backward_that_is_asked_for_later(
    op: str, environment: Environment
) -> None:
    y, leaves, dy = forward(op, torch.float32)
    with use_backend("reference"):
        torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert last_choice(op).name == "reference"
    environment("composed")
    torch.autograd.grad(y, leaves, dy)
    assert last_choice(op).name == "composed"


# --- planted faults


def test_a_backward_that_expects_another_h_is_seen(
    monkeypatch: pytest.MonkeyPatch, environment: Environment
) -> None:
    """One that saves h with the gate in it and takes it out again is right only with itself."""
    fwd, bwd = composed.low_rank_fwd, composed.low_rank_bwd

    def gated_fwd(p: LowRank, recipe: str) -> Any:
        y, h = fwd(p, recipe)
        return y, h * p.gate

    def gated_bwd(p: LowRankGradient, recipe: str) -> Any:
        return bwd(p._replace(h=p.h / p.gate), recipe)

    monkeypatch.setattr(composed, "low_rank_fwd", gated_fwd)
    monkeypatch.setattr(composed, "low_rank_bwd", gated_bwd)
    y, leaves, dy = forward("qr_linear", torch.float32, backend="composed")
    check_gradients("qr_linear", torch.float32, list(torch.autograd.grad(y, leaves, dy)))
    with pytest.raises(AssertionError, match="lam is off"):
        test_every_pair("qr_linear", torch.float32, environment, monkeypatch)


def test_a_forward_that_pins_nothing_is_seen(
    monkeypatch: pytest.MonkeyPatch, environment: Environment
) -> None:
    monkeypatch.setattr("qrlora_kernels.ops.low_rank.pinned_backend", lambda backend: None)
    for test in (test_asked_for_in_code_is_pinned, test_asked_for_by_the_environment_is_pinned):
        with pytest.raises(AssertionError):
            test("qr_linear", environment)
