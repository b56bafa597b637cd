"""The registered operators: schemas and fakes, torch.compile, torch.jit.trace, aliasing."""

from __future__ import annotations

import helpers
import pytest
import torch
from helpers import OPERANDS, OPS
from torch import Tensor, library

from qrlora_kernels.dispatch.problem import GATES

SIZES = (7, 24, 36, 3)
OPERATOR = {"qr_linear": "low_rank", "lora_xs_linear": "low_rank", "kron_linear": "kron"}
LOW_RANK = [(gate, form) for gate in GATES for form in ("two_sided", "output")]
CASES = [*LOW_RANK, ("kron_linear", ""), ("linear_add", "")]


def low_rank_operands(gate, form, wide=0):
    """weight, bias, up, down, gate, index; ``wide``: how much wider than the gate factors are."""
    torch.manual_seed(0)
    _, n, k, r = SIZES
    adapters = 3
    shape = ((adapters,) if gate.startswith("mixed") else ()) + (r,) * (1 + gate.endswith("core"))
    index = torch.tensor([0, 2, 2, 0, 2, 0, 0]) if gate.startswith("mixed") else None
    up, down = torch.randn(n, r + wide), torch.randn(r + wide, k)
    weight, bias = torch.randn(n, k), torch.randn(n)
    return weight, bias, up, None if form == "output" else down, torch.randn(shape), index


def _operator_arguments(op, form):
    m, n, k, r = SIZES
    dy = torch.randn(m, n)
    if op == "linear_add":
        yield "linear_add_fwd", (*helpers.operands(op, *SIZES).values(), None)
        return
    needs = [(True, True), (True, False), (False, True)]
    if op == "kron_linear":
        operands = helpers.operands(op, *SIZES)
        factors = [operands[name] for name in OPERANDS[op]]
        yield "kron_fwd", (*operands.values(), helpers.SCALING, None)
        head, needs = (dy, operands["x"], operands["weight"], *factors), [(True, *p) for p in needs]
    else:
        weight, bias, *factors = low_rank_operands(op, form)
        yield "low_rank_fwd", (torch.randn(m, k), weight, bias, *factors, helpers.SCALING, None)
        head = (dy, weight, *factors, torch.randn(m, r))
    for flags in needs:
        yield f"{OPERATOR.get(op, 'low_rank')}_bwd", (*head, helpers.SCALING, *flags, None)


@pytest.mark.parametrize(("op", "form"), CASES)
def test_opcheck(op, form):
    for name, arguments in _operator_arguments(op, form):
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
    assert f"qrlora::{OPERATOR.get(op, op)}_fwd" in str(traced.graph)


@pytest.mark.parametrize(("op", "form"), CASES)
def test_outputs_do_not_alias_inputs(op, form):
    for name, arguments in _operator_arguments(op, form):
        results = getattr(torch.ops.qrlora, name)(*arguments)
        results = (results,) if isinstance(results, Tensor) else results
        given = {t.untyped_storage().data_ptr() for t in arguments if isinstance(t, Tensor)}
        pointers = [t.untyped_storage().data_ptr() for t in results if t.numel()]
        assert not given & set(pointers)
        assert len(set(pointers)) == len(pointers)
