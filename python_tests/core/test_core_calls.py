"""The low-rank operation on addresses and on tensors, for one gate and for one of each row."""

from __future__ import annotations

import pytest
import torch
from problems import ADAPTERS, GATES, by_addresses, by_tensors, close, expected, low_rank, strided

of_each_gate = pytest.mark.parametrize("gate", GATES)
of_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@of_each_gate
@of_both_dtypes
@pytest.mark.parametrize("wider", [0, 2])
@pytest.mark.parametrize("m", [1, 7, 48])
def test_both_ways_give_what_torch_gives(core, column, gate, dtype, wider, m):
    for r in (1, 3, 20):
        p = low_rank(gate, dtype, m, r=r, wider=wider)
        want = expected(p)
        by_address = by_addresses(core, p, core.code(column))
        close(by_address, want)
        got = by_tensors(core, p, core.code(column))
        close(got, want)
        assert all(map(torch.equal, got, by_address))


@of_each_gate
@pytest.mark.parametrize("columns", range(8))
def test_strides(core, gate, columns):
    p = strided(low_rank(gate, wider=columns % 2), columns)
    want = expected(p)
    close(by_addresses(core, p, core.code()), want)
    close(by_tensors(core, p, core.code()), want)


@of_each_gate
@pytest.mark.parametrize("lead", [(), (1,), (2, 1, 3)], ids=str)
def test_leading_dimensions(core, gate, lead):
    m = torch.Size(lead).numel()
    p = low_rank(gate, m=m)
    p = p._replace(x=p.x.view(*lead, -1), dy=p.dy.view(*lead, -1), bias=None)
    want = expected(p)
    close(by_tensors(core, p, core.code()), want)
    if p.index is not None:
        p = p._replace(index=p.index.view(lead))
        close(by_tensors(core, p, core.code()), want)


def test_large_cores_and_many_rows(core):
    """Sums in chunks, blocks of columns, two threads: the same bits as one."""
    for gate, m, r in (("core", 1500, 70), ("mixed_core", 5300, 70), ("mixed_vector", 5300, 70)):
        p = low_rank(gate, torch.float32, m, n=130, k=90, r=r)
        one, two = (by_addresses(core, p, core.code(), threads) for threads in (1, 2))
        assert all(map(torch.equal, one, two))
        exact = by_addresses(core, low_rank(gate, torch.float64, m, 130, 90, r), core.code())
        close(exact, expected(low_rank(gate, torch.float64, m, 130, 90, r)))
        want = expected(p)
        assert ((one.dgate - want.dgate).norm() / want.dgate.norm()).item() < 1e-6


# --- mixed batches


@pytest.mark.parametrize("gate", GATES[2:])
@of_both_dtypes
@pytest.mark.parametrize("m", [13, 5300])
def test_nobody_feels_who_else_is_in_the_batch(core, column, gate, dtype, m):
    """Rows and gradients have the bits of the adapter's batch alone; of few tokens, unmixed too."""
    code = core.code(column)
    p = low_rank(gate, dtype, m, n=24, k=36, r=17)
    all_ = by_addresses(core, p, code, 2)
    for a in range(ADAPTERS - 1):
        at = (p.index == a).nonzero()[:, 0]
        assert len(at), "the test needs each of them"
        own = p._replace(x=p.x[at], dy=p.dy[at], index=p.index[at])
        alone = by_addresses(core, own, code)
        unmixed = by_addresses(core, own._replace(index=None, gate=p.gate[a].clone()), code)
        few = m == 13  # many tokens of one adapter go by panels
        for name in ("y", "h", "dx"):
            mine = getattr(all_, name)[at]
            assert torch.equal(mine, getattr(alone, name)), name
            assert not few or torch.equal(mine, getattr(unmixed, name)), name
        assert torch.equal(all_.dgate[a], alone.dgate[a])
        assert not few or torch.equal(all_.dgate[a], unmixed.dgate)


@pytest.mark.parametrize("gate", GATES[2:])
@pytest.mark.parametrize("scaling", [-1.0, torch.inf])
def test_an_adapter_in_no_row_gets_exactly_zero(core, gate, scaling):
    p = low_rank(gate)._replace(scaling=scaling)
    for got in (by_addresses(core, p, core.code()), by_tensors(core, p, core.code())):
        absent = got.dgate[ADAPTERS - 1]
        assert torch.equal(absent, torch.zeros_like(absent))
        assert not absent.signbit().any()


@pytest.mark.parametrize("gate", GATES[2:])
def test_far_more_adapters_than_rows(core, gate):
    p = low_rank(gate, m=3)
    p = p._replace(gate=p.gate.repeat(400, *[1] * (p.gate.dim() - 1)),
                   index=torch.tensor([1999, 0, 1999]))  # fmt: skip
    close(by_tensors(core, p, core.code()), expected(p))


@pytest.mark.parametrize("gate", GATES[2:])
def test_an_index_that_does_not_fit_is_refused(core, gate):
    p = low_rank(gate)
    y, h, *_ = by_tensors(core, p, core.code())
    wrong = {
        "negative": p.index - 1 - p.index.min(),
        "past the end": p.index + ADAPTERS - p.index.max(),
        "int32": p.index.int(),
        "floating": p.index.double(),
        "short": p.index[1:],
        "a row too many": torch.zeros(len(p.index) + 1, dtype=torch.int64),
        "another shape": p.index.view(1, -1),
        "gaps": p.index.repeat_interleave(2)[::2],
        "a number": 1,
    }
    for name, index in wrong.items():
        changed = p._replace(index=index)
        assert core.c.low_rank_forward_call(*changed.forward_operands()) is None, name
        assert core.c.low_rank_backward_call(*changed.backward_operands(h)) is None, name
    assert torch.equal(core.c.low_rank_forward_call(*p.forward_operands()), y)
