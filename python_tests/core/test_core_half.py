"""bf16 products of every instruction set: one rounding, whatever the size and however it lies."""

from __future__ import annotations

import pytest
import torch
from problems import in_panels, low_rank, matrix
from torch import Tensor

BF16 = torch.bfloat16
LIES = ["rows", "columns", "strided"]
# M, N, K: single elements, around a tile, odd depths, B's rows in pages of their own, segments.
SIZES = [
    (1, 1, 1),
    (3, 17, 9),
    (13, 65, 64),
    (50, 147, 130),
    (97, 45, 4700),
    (5, 4096, 600),
    (200, 130, 4610),
    (600, 70, 515),
]


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(BF16)


def laid(t: Tensor, lies: str) -> Tensor:
    if lies == "columns":
        return t.mT.contiguous().mT
    return torch.cat([t, t], 1)[:, : t.shape[1]] if lies == "strided" else t


def product(core, code: int, x: Tensor, w: Tensor, bias, addend: Tensor, threads: int) -> Tensor:
    y = torch.full_like(addend, torch.nan)
    core.c.linear_add(
        code, (*addend.shape, x.shape[1], 2, threads), matrix(x), matrix(w),
        0 if bias is None else bias.data_ptr(), addend.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y


@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_rounding(core, column, size, lies):
    """Of a sum in fp32: half a unit of bf16 from the exact one, and what fp32 loses."""
    m, n, k = size
    x, w, bias, addend = drawn(m, k), drawn(n, k), drawn(n), drawn(m, n)
    exact = x.double() @ w.double().T + bias.double() + addend.double()
    terms = x.double().abs() @ w.double().abs().T + bias.double().abs() + addend.double().abs()
    y = product(core, core.code(column), laid(x, lies), laid(w, lies), bias, addend, 1)
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + terms * 2**-20).all()
    again = product(core, core.code(column), x, laid(w, LIES[lies == "rows"]), bias, addend, 2)
    assert torch.equal(y, again), "the order of a sum depends on its depth alone"


def test_without_a_row_or_a_term(core, column):
    code, addend = core.code(column), drawn(3, 5)
    assert torch.equal(product(core, code, drawn(3, 0), drawn(5, 0), None, addend, 1), addend)
    nothing = product(core, code, drawn(0, 4), drawn(5, 4), None, drawn(0, 5), 1)
    assert nothing.shape == (0, 5)


def test_what_is_not_finite_stays_so(core, column):
    """A sum of NaN is NaN, of infinities theirs, and what bf16 cannot hold becomes infinite."""
    x = torch.tensor([[torch.nan], [torch.inf], [-3e38], [1.0]], dtype=BF16)
    w = torch.tensor([[1.0], [-2.0]], dtype=BF16)
    y = product(core, core.code(column), x, w, None, torch.zeros(4, 2, dtype=BF16), 1)
    assert y.isnan().tolist() == [[True, True], [False, False], [False, False], [False, False]]
    assert y[1].tolist() == [torch.inf, -torch.inf]
    assert y[2, 1].item() == torch.inf
    assert y[3].tolist() == [1.0, -2.0]


@pytest.mark.parametrize("gate", ["vector", "core"])
@pytest.mark.parametrize(
    ("m", "n", "k", "r"), [(1, 70, 40, 3), (33, 384, 130, 21), (300, 45, 515, 64)]
)
def test_panels_and_threads_change_no_bit(core, gate, m, n, k, r):
    """Of whole steps, whose operands are read where they lie or kept as the kernel reads them."""
    p = low_rank(gate, BF16, m, n, k, r)
    code, scaling = core.code(), (p.gate.data_ptr(), 2, gate == "core", p.scaling)
    frozen = (p.weight, p.down, p.up)
    kept = [in_panels(core, t) for t in frozen]
    back = [in_panels(core, t.mT) for t in (p.weight, p.up, p.down)]
    results = []
    for threads, there, turned in ((1, [], []), (3, [], []), (1, kept, back), (2, kept, back)):
        y, h = drawn(m, n), drawn(m, r)
        dx, dgate = drawn(m, k), torch.full(p.gate.shape, torch.nan)
        shape = (m, n, k, r, 2, threads)
        addresses = tuple(t.data_ptr() for t in there) or (0, 0, 0)
        core.c.low_rank_forward(
            code, shape, matrix(p.x.view(m, k)), *map(matrix, frozen), scaling,
            p.bias.data_ptr(), y.data_ptr(), h.data_ptr(), panels=addresses,
        )  # fmt: skip
        core.c.low_rank_backward(
            code, shape, matrix(p.dy.view(m, n)), *map(matrix, frozen), scaling, h.data_ptr(),
            dx.data_ptr(), dgate.data_ptr(),
            panels=tuple(t.data_ptr() for t in turned) or (0, 0, 0),
        )  # fmt: skip
        results.append((y, h, dx, dgate))
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))
