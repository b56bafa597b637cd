"""What kernels and library calls read at an address is what the tensor stands for."""

from __future__ import annotations

from typing import Any

import disguises
import helpers
import pytest
import torch
from disguises import Wrapper
from helpers import OPERANDS, OPS, TRAINABLES
from torch import Tensor

from qrlora_kernels import LoRAXSLinear, OHoRALinear, QRLinear, linalg, native
from qrlora_kernels.backends import base_product, composed, cpu
from qrlora_kernels.native import pointers
from qrlora_kernels.ops import direct

N, K, R = 24, 36, 3
of_each = pytest.mark.parametrize("op", OPS)
few_and_many = pytest.mark.parametrize("m", [7, 70])
in_fp32_and_bf16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
natively = pytest.mark.skipif(native.CORE is None, reason=native.REASON)


def _ways(op: str, dtype: torch.dtype) -> list[str | None]:
    """Free, which may be one native call, and each backend by name."""
    return [None, *helpers.cpu_backends(op, dtype)]


# --- a bias with a stride

BIASES = {
    "every second": lambda dtype: torch.randn(2 * N).to(dtype)[::2],
    "expanded": lambda dtype: torch.randn(1).to(dtype).expand(N),
    "a column": lambda dtype: torch.randn(N, 3).to(dtype)[:, 1],
}
of_each_bias = pytest.mark.parametrize("bias", BIASES)


@of_each_bias
@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_onednn_gets_a_dense_bias(bias: str, m: int) -> None:
    """In fp32, which oneDNN's linear with an addend takes on every CPU."""
    x, weight, addend = torch.randn(m, K), torch.randn(N, K), torch.randn(m, N)
    given = BIASES[bias](torch.float32)
    y = composed._linear_bias_add(x, weight, given, addend)
    want = x.double() @ weight.double().mT + given.double() + addend.double()
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)


@of_each_bias
@in_fp32_and_bf16
@few_and_many
@of_each
def test_a_bias_that_is_not_contiguous(op: str, m: int, dtype: torch.dtype, bias: str) -> None:
    operands = helpers.operands(op, m, N, K, R, dtype) | {"bias": BIASES[bias](dtype)}
    dense = operands | {"bias": operands["bias"].clone(memory_format=torch.contiguous_format)}
    for backend in _ways(op, dtype):
        y: Tensor = helpers.call(op, operands, backend=backend)
        assert helpers.same_bits(y, helpers.call(op, dense, backend=backend)), backend


# --- negated views


@pytest.mark.parametrize(
    ("dtype", "disguise"), [(torch.float32, "negated"), (torch.bfloat16, "negated, pickled")]
)
@few_and_many
@of_each
def test_a_negated_view_in_every_operand(op, m, dtype, disguise):
    """Its numbers lie in memory with the other sign; nothing but the tensor tells."""
    operands = helpers.operands(op, m, N, K, R, dtype)
    dy = helpers.gradient_like(op, operands)

    def outcome(given: dict[str, Any], dy: Tensor, backend: str | None) -> dict[str, Tensor]:
        gate = TRAINABLES[op][0]
        leaf = given[gate].detach().requires_grad_()
        x = given["x"].detach().requires_grad_()
        y = helpers.call(op, given | {gate: leaf, "x": x}, backend=backend)
        dx, dgate = torch.autograd.grad(y, (x, leaf), dy)
        # The addend's gradient is dy itself.
        return {"y": y.detach(), "dx": dx, "gate": dgate.resolve_neg()}

    for backend in _ways(op, dtype):
        want = outcome(operands, dy, backend)
        for name in (*operands, "dy"):
            negated = disguises.SAME[disguise]((operands | {"dy": dy})[name])
            assert negated.is_neg()
            given = operands if name == "dy" else operands | {name: negated}
            got = outcome(given, negated if name == "dy" else dy, backend)
            for key in want:
                assert helpers.same_bits(got[key], want[key]), f"{backend} {name} {key}"


@of_each
def test_the_imaginary_part_of_a_conjugate(op):
    """Negated, with a stride, over a storage of complex numbers."""
    operands = helpers.operands(op, 7, N, K, R)
    for name, t in operands.items():
        view = torch.complex(torch.zeros_like(t), -t).conj().imag
        assert view.is_neg()
        for backend in _ways(op, torch.float32):
            y = helpers.call(op, operands | {name: view}, backend=backend)
            torch.testing.assert_close(y, helpers.call(op, operands), msg=f"{backend} {name}")


STARTS = {
    "pivoted_qr": lambda w: linalg.pivoted_qr(w, 4),
    "truncated_svd": lambda w: linalg.truncated_svd(w, 4),
    "kron_factors": lambda w: linalg.kron_factors(w, 4),
}
of_each_start = pytest.mark.parametrize("start", STARTS)


@of_each_start
def test_a_start_of_a_negated_matrix(start):
    z = torch.randn(32, 32, dtype=torch.complex64)
    got, want = STARTS[start](z.conj().imag), STARTS[start](-z.imag)
    for one, other in zip(_tensors(got), _tensors(want), strict=True):
        assert helpers.same_bits(one, other)


def _tensors(result: Any) -> list[Tensor]:
    values = result if isinstance(result, tuple) else vars(result).values()
    return [value for value in values if isinstance(value, Tensor)]


@natively
def test_no_view_is_needed_for_a_negation():
    """Detached, saved or loaded, such a tensor is no view of anything: each has to be asked."""
    for disguise in ("negated", "negated, pickled"):
        t = disguises.SAME[disguise](torch.randn(3, 4))
        assert t.is_neg()
        assert (t._base is None) == (disguise == "negated, pickled")
        assert not native.CORE.are_plain(t)


# --- no memory of their own


@few_and_many
@of_each
def test_a_wrapper_is_refused_in_every_operand(op, m):
    """The class of a quantised weight, say, of which no operation of ours is known."""
    operands = helpers.operands(op, m, N, K, R)
    for backend in _ways(op, torch.float32):
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


@pytest.mark.parametrize("disguise", disguises.REFUSED)
@in_fp32_and_bf16
@few_and_many
@of_each
def test_memory_that_is_not_there_is_refused(op, m, dtype, disguise):
    operands = helpers.operands(op, m, N, K, R, dtype)
    for backend in _ways(op, dtype):
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
    for backend in _ways(op, torch.float32):
        with pytest.raises(TypeError):
            helpers.call(op, operands, backend=backend)


@few_and_many
@of_each
def test_a_zero_tensor_without_memory_is_zero(op, m):
    operands = helpers.operands(op, m, N, K, R)
    for backend in _ways(op, torch.float32):
        for name, t in operands.items():
            zero = disguises.OTHER["zero"](t)
            got = helpers.call(op, operands | {name: zero}, backend=backend)
            want = helpers.call(op, operands | {name: torch.zeros_like(t)}, backend=backend)
            assert helpers.same_bits(got, want), f"{backend} {name}"


@few_and_many
@of_each
def test_memory_freed_before_the_backward(op, m):
    """As a sharded model frees its weights: what was saved is empty by then."""
    for backend in _ways(op, torch.float32):
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
    for backend in _ways(op, torch.float32):
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
        STARTS[start](given)


@of_each_start
def test_a_start_of_a_zero_tensor(start):
    zero = disguises.OTHER["zero"](torch.randn(32, 32))
    if start == "truncated_svd":
        assert not linalg.truncated_svd(zero, 4).s.any()
        return
    with pytest.raises(ValueError, match="weights must"):
        STARTS[start](zero)


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
    monkeypatch.setattr(direct, "AVAILABLE", False)
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


# --- the addresses themselves


def test_what_no_kernel_reads_is_copied():
    t = torch.randn(6, 8)
    held, (address, row, column) = pointers.matrix(t[:, ::2])
    assert (held.is_contiguous(), address, row, column) == (True, held.data_ptr(), 4, 1)
    for expanded in (t[:1].expand(6, 8), t[:, :1].expand(6, 8)):
        assert pointers.matrix(expanded)[1][1:] == (8, 1)
        assert pointers.rows(expanded)[1][1:] == (8, 1)
    assert pointers.matrix(t.mT)[1] == (t.data_ptr(), 1, 8)
    assert pointers.rows(t.mT)[1][1:] == (6, 1)
    held, addresses = pointers.dense(t[:, 0], None, t)
    assert held[0].is_contiguous()
    assert addresses == [held[0].data_ptr(), 0, t.data_ptr()]


def test_results_are_written_where_they_are_or_not_at_all():
    t = torch.empty(6, 8)
    assert pointers.out(t, None) == [t.data_ptr(), 0]
    with pytest.raises(ValueError, match="a result must be contiguous"):
        pointers.out(t.mT)
    with pytest.raises(TypeError, match="a result must be written as it lies"):
        pointers.out(torch._neg_view(t))
    with pytest.raises(TypeError, match="taken as it lies"):
        pointers.address(torch._neg_view(t), "t")


@pytest.mark.parametrize("make", [pointers.matrix, pointers.rows, pointers.address])
def test_the_device_is_asked(make):
    with pytest.raises(TypeError, match="t must be on cuda:0, got a tensor on cpu"):
        make(torch.randn(6, 8), "t", torch.device("cuda", 0))


@natively
def test_backends_called_by_name_refuse_as_well():
    """They are functions of their own, with nobody before them who has asked."""
    op = helpers.operands("kron_linear", 7, N, K, R)
    low = helpers.operands("qr_linear", 7, N, K, R)
    for bad in (Wrapper, *disguises.REFUSED.values(), disguises.ANSWERING["functional"]):
        with pytest.raises(TypeError):
            cpu.kron_linear_fwd(*(op | {"a0": bad(op["a0"])}).values(), 1.0)
        for name in ("x", "weight", "bias", "q", "lam"):
            with pytest.raises(TypeError):
                cpu.qr_linear_fwd(*(low | {name: bad(low[name])}).values(), 1.0)
        y = torch.zeros(7, N)
        with pytest.raises(TypeError):
            base_product.linear_add(low["x"], low["weight"], bad(low["bias"]), y, out=y)
