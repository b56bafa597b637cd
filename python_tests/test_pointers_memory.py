"""Operands without elements in memory of their own are refused, or answered by their class."""

from __future__ import annotations

import disguises
import helpers
import pytest
import torch
from disguises import Wrapper
from helpers import OPERANDS, OPS
from torch import Tensor

from qrlora_kernels import LoRAXSLinear, OHoRALinear, QRLinear, linalg, native
from qrlora_kernels.backends import core_calls, cpu
from qrlora_kernels.native import pointers
from qrlora_kernels.operands import Kron, LowRank
from qrlora_kernels.ops import eager

N, K, R = 24, 36, 3
of_each = pytest.mark.parametrize("op", OPS)
few_and_many = pytest.mark.parametrize("m", [7, 70])
in_fp32_and_bf16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
of_each_start = pytest.mark.parametrize("start", helpers.STARTS)


# --- wrappers


@few_and_many
@of_each
def test_a_wrapper_is_refused_in_every_operand(op, m):
    """The class of a quantised weight, say, of which no operation of ours is known."""
    operands = helpers.operands(op, m, N, K, R)
    for backend in helpers.ways(op, torch.float32):
        for name, t in operands.items():
            with pytest.raises(TypeError, match=f"{name} must be a plain tensor.* got Wrapper"):
                helpers.call(op, operands | {name: Wrapper(t)}, backend=backend)


@pytest.mark.parametrize("kind", [QRLinear, LoRAXSLinear, OHoRALinear])
@few_and_many
def test_a_layer_whose_weight_is_quantised_afterwards(kind, m):
    layer = kind.from_linear(torch.nn.Linear(32, 32), rank=4)
    layer.weight = torch.nn.Parameter(Wrapper(layer.weight.detach()), requires_grad=False)
    with pytest.raises(TypeError, match="weight must be a plain tensor"):
        layer(torch.randn(m, 32))


@few_and_many
@of_each
def test_a_wrapper_that_answers_is_asked(op, m):
    operands = helpers.operands(op, m, N, K, R)
    want = helpers.call(op, operands)
    for name, t in operands.items():
        y = helpers.call(op, operands | {name: disguises.ANSWERING["two"](t)})
        assert helpers.same_bits(y.a, want), name
        assert helpers.same_bits(y.b, want), name


# --- freed memory


@pytest.mark.parametrize("disguise", disguises.REFUSED)
@in_fp32_and_bf16
@few_and_many
@of_each
def test_memory_that_is_not_there_is_refused(op, m, dtype, disguise):
    operands = helpers.operands(op, m, N, K, R, dtype)
    for backend in helpers.ways(op, dtype):
        for name, t in operands.items():
            given = operands | {name: disguises.REFUSED[disguise](t)}
            with pytest.raises(TypeError, match=f"{name} must hold data"):
                helpers.call(op, given, backend=backend)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a class that lacks the operation
@pytest.mark.parametrize("disguise", ["wrapper", "masked", "functional"])
@pytest.mark.parametrize(("op", "name"), [(op, "bias") for op in OPS] + [("kron_linear", "a0")])
def test_a_null_pointer_is_not_an_absent_operand(op, name, disguise):
    operands = helpers.operands(op, 7, N, K, R)
    operands[name] = disguises.ANSWERING[disguise](operands[name])
    for backend in helpers.ways(op, torch.float32):
        with pytest.raises(TypeError):
            helpers.call(op, operands, backend=backend)


@few_and_many
@of_each
def test_a_zero_tensor_without_memory_is_zero(op, m):
    operands = helpers.operands(op, m, N, K, R)
    for backend in helpers.ways(op, torch.float32):
        for name, t in operands.items():
            zero = disguises.OTHER["zero"](t)
            got = helpers.call(op, operands | {name: zero}, backend=backend)
            want = helpers.call(op, operands | {name: torch.zeros_like(t)}, backend=backend)
            assert helpers.same_bits(got, want), f"{backend} {name}"


@few_and_many
@of_each
def test_memory_freed_before_the_backward(op, m):
    """As a sharded model frees its weights: what was saved is empty by then."""
    for backend in helpers.ways(op, torch.float32):
        operands = helpers.operands(op, m, N, K, R)
        x = operands["x"].requires_grad_()
        y = helpers.call(op, operands, backend=backend)
        operands["weight"].untyped_storage().resize_(0)
        with pytest.raises(TypeError, match="weight must hold data"):
            y.backward(torch.ones(m, N))
        assert x.grad is None


@few_and_many
@of_each
@pytest.mark.parametrize("leaf", ["x", "bias"])
def test_a_gradient_without_memory(op, m, leaf):
    for backend in helpers.ways(op, torch.float32):
        operands = helpers.operands(op, (1, m), N, K, R)
        operands[leaf].requires_grad_()
        y = helpers.call(op, operands, backend=backend)
        dy = torch.ones(1, m, 2 * N)
        half = dy[..., ::2]
        dy.untyped_storage().resize_(0)
        with pytest.raises(TypeError, match="dy must hold data"):
            y.backward(half)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of prototypes
@of_each_start
@pytest.mark.parametrize(
    "disguise", [*disguises.REFUSED, "wrapper", "masked", "fake", "functional", "sparse", "nested"]
)
def test_a_start_of_a_matrix_without_elements(start, disguise):
    given = (disguises.REFUSED | disguises.ANSWERING)[disguise](torch.randn(32, 32))
    with pytest.raises(TypeError, match="weights must"):
        helpers.STARTS[start](given)


@of_each_start
def test_a_start_of_a_zero_tensor(start):
    zero = disguises.OTHER["zero"](torch.randn(32, 32))
    if start == "truncated_svd":
        assert not linalg.truncated_svd(zero, 4).s.any()
        return
    with pytest.raises(ValueError, match="weights must"):
        helpers.STARTS[start](zero)


@of_each
def test_autocast_does_not_read_before_the_checks(op):
    operands = helpers.operands(op, 7, N, K, R)
    for name in ("x", "weight", "bias"):
        given = operands | {name: disguises.REFUSED["freed"](operands[name])}
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(TypeError, match=f"{name} must hold data"),
        ):
            helpers.call(op, given)


@of_each
def test_the_plain_expression_is_not_given_freed_memory_either(op):
    """It runs where a frozen operand asks for a gradient."""
    operands = helpers.operands(op, 7, N, K, R)
    operands["weight"].requires_grad_()
    last = OPERANDS[op][-1]
    operands[last] = disguises.REFUSED["freed"](operands[last])
    with pytest.raises(TypeError, match=f"{last} must hold data"):
        helpers.call(op, operands)


@of_each
def test_without_the_native_reader_the_same_is_found(op, monkeypatch):
    """Where the core is not built, or torch has no exchange: each tensor is examined in Python."""
    monkeypatch.setattr(pointers, "are_plain", pointers._tells_nothing)
    monkeypatch.setattr(eager, "AVAILABLE", False)
    operands = helpers.operands(op, 7, N, K, R)
    want = helpers.call(op, operands)
    for name, t in operands.items():
        negated = operands | {name: disguises.SAME["negated"](t)}
        assert helpers.same_bits(helpers.call(op, negated), want), name
        with pytest.raises(TypeError, match=f"{name} must hold data"):
            helpers.call(op, operands | {name: disguises.REFUSED["freed"](t)})
        for disguise in ("subclass", "parameter", "far apart"):
            y = helpers.call(op, operands | {name: disguises.SAME[disguise](t)})
            torch.testing.assert_close(y.as_subclass(Tensor), want)


def step(backend, p):
    """As the chooser calls it, had nobody before asked for the problem."""
    operation = "kron" if isinstance(p, Kron) else "low_rank"
    return getattr(backend, f"{operation}_fwd")(p, "native")


@pytest.mark.skipif(native.CORE is None, reason=native.REASON)
def test_backends_called_by_name_refuse_as_well():
    """They are functions of their own, with nobody before them who has asked."""
    op = helpers.operands("kron_linear", 7, N, K, R)
    low = helpers.operands("qr_linear", 7, N, K, R)
    for bad in (Wrapper, *disguises.REFUSED.values(), disguises.ANSWERING["functional"]):
        with pytest.raises(TypeError):
            step(cpu, Kron(*(op | {"a0": bad(op["a0"])}).values(), 1.0))
        for name in ("x", "weight", "bias", "q", "lam"):
            with pytest.raises(TypeError):
                step(cpu, LowRank(*(low | {name: bad(low[name])}).values(), None, 1.0))
        y, bias = torch.zeros(7, N), bad(low["bias"])
        with pytest.raises(TypeError):
            core_calls.linear_add(core_calls.code(), low["x"], low["weight"], bias, y, out=y)
