"""The Kronecker update and the base product, as they are told."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from problems import NUMBERS, low_rank, matrix
from torch import Tensor

of_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class Kron(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    a0: Tensor | None
    b0: Tensor | None
    scaling: float
    dy: Tensor

    def key(self, step: int, needs: int = 0) -> tuple[int, ...]:
        n, k = self.weight.shape
        bias = int(step == 0 and self.bias is not None)
        columns = int(self.weight.stride(1) != 1)
        shape = (self.x.shape[0], n, k, self.a.shape[1])
        return 1, step, NUMBERS[self.x.dtype], *shape, 0, columns, needs, bias

    def backward_operands(self, *needs: bool) -> tuple[Any, ...]:
        factors = (self.a, self.b, self.a0, self.b0)
        return (self.dy, self.x, self.weight, *factors, self.scaling, *needs, None)


def kron(dtype: torch.dtype = torch.float64, m: int = 7, *, start: bool = True) -> Kron:
    make = torch.Generator().manual_seed(m)
    n, k, r = 8, 6, 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=dtype)

    a, b = normal(n, r), normal(k, r)
    a0, b0 = (a + normal(n, r) / 8, b + normal(k, r) / 8) if start else (None, None)
    x, dy, weight = normal(m, r * k), normal(m, n * r), normal(n * r, r * k)
    return Kron(x, weight, normal(n * r), a, b, a0, b0, 0.7, dy)


def kron_expected(p: Kron, *, base: bool = True) -> dict[str, Tensor]:
    x, a, b = (t.double().detach().requires_grad_() for t in (p.x, p.a, p.b))
    delta = torch.kron(a, b.T.contiguous())
    if p.a0 is not None and p.b0 is not None:
        delta = delta - torch.kron(p.a0.double(), p.b0.double().T.contiguous())
    y = p.scaling * x @ delta.T
    if base:
        y = y + x @ p.weight.T + (0 if p.bias is None else p.bias)
    dx, da, db = torch.autograd.grad(y, (x, a, b), p.dy.double())
    return {"y": y.detach(), "dx": dx, "da": da, "db": db}


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m", [1, 7, 40])
def test_kron_calls(core, column, start, alone, bias, m):
    """The whole step, or the update with the choice for whoever adds the base product."""
    p = kron(m=m, start=start)._replace(**({} if bias else {"bias": None}))
    want = kron_expected(p, base=not alone)
    code = core.code(column) + 16 * alone
    assert core.c.kron_forward_call(*p[:8], None) is NotImplemented
    core.c.tell(p.key(0), code, "kron", "forward")
    core.c.tell(p.key(1, 7), code, "kron", "backward")
    y, base, record = core.c.kron_forward_call(*p[:8], None)
    assert (base, record) == ("forward" if alone else None, False)
    assert core.last == {"kron": "forward"}
    torch.testing.assert_close(y, want["y"])
    assert core.c.kron_forward_call(*p[:3], p.a.requires_grad_(), *p[4:8], None)[2] is True
    *gradients, base = core.c.kron_backward_call(*p.backward_operands(True, True, True))
    assert base == ("backward" if alone else None)
    assert core.last == {"kron": "backward"}
    for name, got in zip(("dx", "da", "db"), gradients, strict=True):
        torch.testing.assert_close(got, want[name])


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_kron_gradients_that_nobody_asks_for(core, needs):
    p = kron()
    bits = sum(need << bit for bit, need in enumerate(needs))
    operands = p.backward_operands(*needs)
    assert core.c.kron_backward_call(*operands) is NotImplemented
    core.c.tell(p.key(1, bits), core.code() + 16, "kron", "told")
    *gradients, base = core.c.kron_backward_call(*operands)
    assert base == ("told" if needs[0] else None), "without dx no base product is due"
    want = kron_expected(p, base=False)
    for need, name, got in zip(needs, ("dx", "da", "db"), gradients, strict=True):
        assert (got is not None) == need
        if need:
            torch.testing.assert_close(got, want[name])


def test_kron_of_somebody_else_and_in_another_layout(core):
    p = kron()
    core.c.tell(p.key(0), -1, "kron", "told")
    core.c.tell(p.key(1, 7), -1, "kron", "told")
    assert core.c.kron_forward_call(*p[:8], None) is None
    assert core.c.kron_backward_call(*p.backward_operands(True, True, True)) is None
    turned = p._replace(weight=p.weight.t().contiguous().t())
    assert core.c.kron_forward_call(*turned[:8], None) is NotImplemented
    assert core.c.kron_forward_call(p.x, p.weight, None, *p[3:8], None) is NotImplemented
    assert core.c.kron_forward_call(*p[:8], object()) is NotImplemented, "W in panels too"
    assert core.last == {}


def test_kron_in_bf16_is_an_update(core, column):
    """Factors in fp32 over bf16, sums in fp32, one rounding."""
    exact = kron()
    half = {name: getattr(exact, name).bfloat16() for name in ("x", "weight", "bias", "dy")}
    factors = {name: getattr(exact, name).float() for name in ("a", "b", "a0", "b0")}
    p = exact._replace(**half, **factors)
    core.c.tell(p.key(0), core.code(column) + 16, "kron", "told")
    y, base, _ = core.c.kron_forward_call(*p[:8], None)
    assert (y.dtype, base) == (torch.bfloat16, "told")
    want = kron_expected(p, base=False)["y"]
    torch.testing.assert_close(y.double(), want, rtol=8e-3, atol=1e-5)


@of_both_dtypes
@pytest.mark.parametrize("columns", [False, True])
def test_linear_add(core, column, dtype, columns):
    p = low_rank(dtype=dtype)
    weight = p.weight.t().contiguous().t() if columns else p.weight
    y = torch.empty_like(p.dy)
    core.c.linear_add(
        core.code(column), (*p.dy.shape, p.x.shape[1], NUMBERS[dtype], 1), matrix(p.x),
        matrix(weight), p.bias.data_ptr(), p.dy.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    want = p.x.double() @ weight.double().T + p.bias.double() + p.dy.double()
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(y.double(), want, rtol=bound, atol=bound)
