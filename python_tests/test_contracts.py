"""The contracts of precision and determinism, for each operation on each backend of this CPU."""

from __future__ import annotations

import error_bound
import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, HALF, OPS
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora_kernels import backends

# (m, n, k, r): empty, one token, odd sizes, ranks that no tile divides.
SHAPES = [
    (0, 96, 48, 3),
    (1, 736, 1504, 16),
    (7, 61, 37, 1),
    (7, 96, 48, 3),
    (199, 736, 480, 16),
    (71, 150, 300, 150),
]
ON_BACKENDS = [
    pytest.param(op, name, dtype, id=f"{op}-{name}-{str(dtype).removeprefix('torch.')}")
    for op in OPS
    for dtype in DTYPES
    for name in helpers.cpu_backends(op, dtype)
]


def _on(backend):
    return lambda op, operands: helpers.call(op, operands, backend=backend)


def test_the_grid_holds_more_than_the_reference():
    """The grids below are only worth something if a fast backend is in them."""
    for op in OPS:
        assert len(helpers.cpu_backends(op, torch.bfloat16)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("op", "backend", "dtype"), ON_BACKENDS)
def test_error_bound(op, backend, dtype, shape):
    """Outputs and gradients lie within the bound of the arithmetic; none is unwritten.

    The fast result is computed on memory full of NaN.
    """
    operands = helpers.operands(op, *shape, dtype)
    dy = helpers.gradient_like(op, operands)
    with helpers.poisoned_memory():
        got = helpers.outcome(_on(backend), op, operands, dy)
    assert backends.last_choice(op).name == backend
    helpers.assert_error_bound(op, operands, dy, got)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_half_precision_is_rounded_once(op, dtype, bias):
    """An update of 1e-2 leaves no room in the bound for a second rounding of y or dx."""
    operands = helpers.operands(op, 33, 96, 480, 16, dtype, bias, change=1e-2)
    dy = helpers.gradient_like(op, operands)
    for backend in helpers.cpu_backends(op, dtype):
        helpers.assert_error_bound(
            op, operands, dy, helpers.outcome(_on(backend), op, operands, dy)
        )


# (m, n, k, r) and as many draws as make enough numbers of the smallest gradient. OHoRA's products
# of few rows and many columns once lost 1.7 times as much as eager's.
POOLED = {"square core": ((16, 48, 64, 16), 32), "few rows": ((9, 150, 300, 150), 4)}


@pytest.mark.parametrize("what", POOLED)
@pytest.mark.parametrize(("op", "backend", "dtype"), ON_BACKENDS)
def test_no_worse_than_eager(op, backend, dtype, what):
    """Contract 1 over many draws: rms errors at most twice the plain expression's."""
    if dtype == torch.float64 and not helpers.EXTENDED:
        pytest.skip("long double is fp64 on this platform: nothing to measure fp64 errors against")
    error_bound.assert_no_worse_than_eager(*helpers.pooled(op, backend, dtype, *POOLED[what]))


# Tokens over which the roundings average out, which leaves a gain known well within its tolerance.
# fp16's are an eighth of bf16's: a 64th of the tokens would do.
TOKENS = {torch.float16: 1024, torch.bfloat16: 8192}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_small_updates_survive(op, dtype, bias):
    """With ‖ΔW‖/‖W‖ = 1e-4, y keeps the update with a gain of 1 ± 0.02 on every backend."""
    operands = helpers.operands(op, TOKENS[dtype], 512, 256, 4, dtype, bias, change=1e-4)
    x = operands["x"]
    base = F.linear(x, operands["weight"], operands["bias"])
    if op == "linear_add":
        update = operands["addend"]
    else:
        update = x.float() @ helpers.delta_weight(op, operands).float().T
    for backend in helpers.cpu_backends(op, dtype):
        y = helpers.call(op, operands, backend=backend)
        gain = helpers.update_gain(y, base, update)
        assert gain == pytest.approx(1.0, abs=0.02), backend


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("op", ["qr_linear", "lora_xs_linear", "kron_linear"])
def test_small_updates_survive_in_dx(op, dtype):
    """The gradient that flows on keeps the update as the output does."""
    operands = helpers.operands(op, TOKENS[dtype], 128, 512, 4, dtype, change=1e-4)
    dy = helpers.gradient_like(op, operands)
    update = dy.float() @ helpers.delta_weight(op, operands).float()
    base = (dy.float() @ operands["weight"].float()).to(dtype)  # once, as the product in half is
    for backend in helpers.cpu_backends(op, dtype):
        x = operands["x"].detach().requires_grad_()
        helpers.call(op, operands | {"x": x}, backend=backend).backward(dy)
        gain = helpers.update_gain(x.grad, base, update)
        assert gain == pytest.approx(1.0, abs=0.02), backend


@pytest.mark.parametrize(("op", "backend", "dtype"), ON_BACKENDS)
def test_same_inputs_same_bits(op, backend, dtype):
    """Outputs and gradients repeat bit for bit, with sums over enough tokens to be split."""
    operands = helpers.operands(op, 1000, 96, 192, 3, dtype)
    dy = helpers.gradient_like(op, operands)
    first = helpers.outcome(_on(backend), op, operands, dy)
    for _ in range(3):
        again = helpers.outcome(_on(backend), op, operands, dy)
        for name, tensor in first.items():
            assert helpers.same_bits(tensor, again[name]), name


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_never_written(op):
    for backend in helpers.cpu_backends(op, torch.float32):
        operands = helpers.operands(op, 7, 32, 48, 4)
        before = {n: t.clone() for n, t in operands.items()}
        dy = helpers.gradient_like(op, operands)
        kept = dy.clone()
        helpers.outcome(_on(backend), op, operands, dy)
        for name, tensor in operands.items():
            assert helpers.same_bits(tensor, before[name]), name
        assert helpers.same_bits(dy, kept)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    op=st.sampled_from(OPS),
    dtype=st.sampled_from(DTYPES),
    m=st.integers(0, 70),
    rank=st.integers(1, 9),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_keeps_the_error_bound(op, dtype, m, rank, rows, columns, bias, seed):
    """Sizes from a generator, not from us; the Kronecker factors are [rows, r], [columns, r]."""
    n, k = rank * rows, rank * columns
    operands = helpers.operands(op, m, n, k, rank, dtype, bias, seed=seed)
    dy = helpers.gradient_like(op, operands, seed)
    for backend in helpers.cpu_backends(op, dtype, m, n, k):
        got = helpers.outcome(_on(backend), op, operands, dy)
        helpers.assert_error_bound(op, operands, dy, got)
