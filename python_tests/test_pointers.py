"""What kernels and library calls read at an address is what the tensor stands for."""

from __future__ import annotations

from typing import Any

import disguises
import helpers
import pytest
import torch
from helpers import OPS, TRAINABLES
from torch import Tensor

from qrlora_kernels import native
from qrlora_kernels.backends import products
from qrlora_kernels.native import pointers

N, K, R = 24, 36, 3
of_each = pytest.mark.parametrize("op", OPS)
few_and_many = pytest.mark.parametrize("m", [7, 70])
in_fp32_and_bf16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
natively = pytest.mark.skipif(native.CORE is None, reason=native.REASON)


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
    y = products._linear_bias_add(x, weight, given, addend)
    want = x.double() @ weight.double().mT + given.double() + addend.double()
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)


@of_each_bias
@in_fp32_and_bf16
@few_and_many
@of_each
def test_a_bias_that_is_not_contiguous(op: str, m: int, dtype: torch.dtype, bias: str) -> None:
    operands = helpers.operands(op, m, N, K, R, dtype) | {"bias": BIASES[bias](dtype)}
    dense = operands | {"bias": operands["bias"].clone(memory_format=torch.contiguous_format)}
    for backend in helpers.ways(op, dtype):
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

    for backend in helpers.ways(op, dtype):
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
        for backend in helpers.ways(op, torch.float32):
            y = helpers.call(op, operands | {name: view}, backend=backend)
            torch.testing.assert_close(y, helpers.call(op, operands), msg=f"{backend} {name}")


of_each_start = pytest.mark.parametrize("start", helpers.STARTS)


@of_each_start
def test_a_start_of_a_negated_matrix(start):
    z = torch.randn(32, 32, dtype=torch.complex64)
    got, want = helpers.STARTS[start](z.conj().imag), helpers.STARTS[start](-z.imag)
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
