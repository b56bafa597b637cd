"""The registered operators: schemas and fakes, torch.compile, torch.jit.trace, aliasing."""

from __future__ import annotations

import helpers
import pytest
import torch
from helpers import OPERANDS, OPS
from torch import Tensor, library

SIZES = (7, 24, 36, 3)


def _operator_arguments(op):
    operands = helpers.operands(op, *SIZES)
    scaling = () if op == "linear_add" else (helpers.SCALING,)
    yield f"{op}_fwd", (*operands.values(), *scaling, None)
    if op == "linear_add":
        return
    m, n, _, r = SIZES
    dy, factors = torch.randn(m, n), [operands[name] for name in OPERANDS[op]]
    needs = [(True, True), (True, False), (False, True)]
    if op == "kron_linear":
        head, needs = (dy, operands["x"], operands["weight"], *factors), [(True, *p) for p in needs]
    else:
        head = (dy, operands["weight"], *factors, torch.randn(m, r))
    for flags in needs:
        yield f"{op}_bwd", (*head, *scaling, *flags, None)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    for name, arguments in _operator_arguments(op):
        library.opcheck(getattr(torch.ops.qrlora, name).default, arguments)


@pytest.mark.parametrize("op", OPS)
def test_compile_without_graph_breaks(op):
    operands = helpers.operands(op, *SIZES)
    dy = helpers.gradient_like(op, operands)
    compiled = torch.compile(lambda given: helpers.call(op, given) * 2, fullgraph=True)
    want = helpers.outcome(lambda o, given: helpers.call(o, given) * 2, op, operands, dy)
    got = helpers.outcome(lambda _, given: compiled(given), op, operands, dy)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_jit_trace_records_one_operator(op):
    """A native kernel writes through a pointer, which a trace of its Python side would not see."""
    operands = helpers.operands(op, *SIZES)
    names = list(operands)

    def function(*values):
        return helpers.call(op, dict(zip(names, values, strict=True)))

    with torch.no_grad():
        traced = torch.jit.trace(function, tuple(operands.values()))
    others = helpers.operands(op, *SIZES, seed=1)
    assert helpers.same_bits(traced(*others.values()), helpers.call(op, others))
    assert f"qrlora::{op}_fwd" in str(traced.graph)


@pytest.mark.parametrize("op", OPS)
def test_outputs_do_not_alias_inputs(op):
    for name, arguments in _operator_arguments(op):
        results = getattr(torch.ops.qrlora, name)(*arguments)
        results = (results,) if isinstance(results, Tensor) else results
        given = {t.untyped_storage().data_ptr() for t in arguments if isinstance(t, Tensor)}
        pointers = [t.untyped_storage().data_ptr() for t in results if t.numel()]
        assert not given & set(pointers)
        assert len(set(pointers)) == len(pointers)
