"""The low-rank step by operands in panels: the step of the operands where they lie."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import NUMBERS, Core, LowRank, expected, in_panels, low_rank, matrix
from torch import Tensor

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
# M, N, K, R: single elements, around a panel's width, around the rows of a tile, many tokens.
SIZES = [(1, 1, 1, 1), (7, 65, 40, 3), (40, 384, 193, 21), (97, 45, 515, 147), (1100, 70, 40, 16)]


def drawn_step(core: Core, p: LowRank, threads: int, by_panels: bool) -> list[Tensor]:
    """y, h, dx and the gate's gradient."""
    (n, k), m, number = p.weight.shape, p.x.numel() // p.x.shape[-1], NUMBERS[p.x.dtype]
    frozen, turned = (p.weight, p.down, p.up), (p.weight.mT, p.up.mT, p.down.mT)
    there, back = ([in_panels(core, t) for t in some] for some in (frozen, turned))
    y, h, dx = (torch.full((m, size), torch.nan, dtype=p.x.dtype) for size in (n, p.r, k))
    dgate = torch.full(p.gate.shape, torch.nan, dtype=p.gate.dtype)
    shape = (m, n, k, p.r, number, threads)
    gate = (p.gate.data_ptr(), number, p.gate.ndim == 2, p.scaling)

    def given(kept: list[Tensor]) -> Any:
        return tuple(t.data_ptr() for t in kept) if by_panels else (0, 0, 0)

    core.c.low_rank_forward(
        core.code(), shape, matrix(p.x.view(m, k)), *map(matrix, frozen), gate,
        p.bias.data_ptr(), y.data_ptr(), h.data_ptr(), panels=given(there),
    )  # fmt: skip
    core.c.low_rank_backward(
        core.code(), shape, matrix(p.dy.view(m, n)), *map(matrix, frozen), gate, h.data_ptr(),
        dx.data_ptr(), dgate.data_ptr(), panels=given(back),
    )  # fmt: skip
    return [y, h, dx, dgate]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("gate", ["vector", "core"])
@pytest.mark.parametrize(("m", "n", "k", "r"), SIZES)
def test_a_step_in_full_precision(core, gate, dtype, m, n, k, r):
    """To rounding; on any number of threads with the same bits."""
    p = low_rank(gate, dtype, m, n=n, k=k, r=r)
    want = expected(p)
    for by_panels in (True, False):  # of many tokens the call makes its own
        found = drawn_step(core, p, 1, by_panels)
        for got, exact in zip(found, (want.y, want.h, want.dx, want.dgate), strict=True):
            exact = exact.view(got.shape)
            bound = 200 * torch.finfo(dtype).eps * float(exact.abs().max())
            torch.testing.assert_close(got.double(), exact, rtol=0, atol=bound)
        for threads in (2, 3):
            assert all(map(torch.equal, found, drawn_step(core, p, threads, by_panels)))


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float64], ids=str)
def test_panels_of_a_call_on_tensors(core, dtype):
    """They are read where a plan is told for them, and where it tells to."""

    class Kept:
        def __init__(self, t: Tensor) -> None:
            self.panels = in_panels(core, t)
            self.address = self.panels.data_ptr()

    p = low_rank("vector", dtype, 9)
    kept = tuple(map(Kept, (p.weight, p.down, p.up)))
    *operands, _ = p.forward_operands()
    key = list(p.forward_key())
    core.c.tell(tuple(key), core.code(), "op", "choice")
    y = core.c.low_rank_forward_call(*operands, None)
    assert core.c.low_rank_forward_call(*operands, kept) is NotImplemented
    key[8] = 2
    core.c.tell(tuple(key), core.code() + 32, "op", "choice")
    by_panels = core.c.low_rank_forward_call(*operands, kept)
    torch.testing.assert_close(by_panels, y)
    for matrix_of in kept:
        matrix_of.panels.zero_()
    core.c.tell(tuple(key), core.code(), "op", "choice")
    assert torch.equal(core.c.low_rank_forward_call(*operands, kept), y), "which reads no panels"
    for wrong in (kept[:2], list(kept), 7):
        assert core.c.low_rank_forward_call(*operands, wrong) is None


def test_a_mixed_batch_has_no_panels(core):
    p = low_rank("mixed_vector", torch.float32, 9)
    *operands, _ = p.forward_operands()
    kept = tuple(SimpleNamespace(address=p.weight.data_ptr()) for _ in range(3))
    assert core.c.low_rank_forward_call(*operands, None) is NotImplemented
    assert core.c.low_rank_forward_call(*operands, kept) is None
