"""Calls with many adapters' gates that were compiled or traced: of any numbers, and checked.

A compiled call handed the index to the kernels as it came: memory of others was read, and in the
backward written, without a word. A trace with one adapter kept that there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ADAPTERS, Kind
from mixed import MIXED, case_of
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qrlora_kernels.functional import mixed_low_rank_linear

ROWS = 6
Call = Callable[..., Tensor]


def parts(kind: Kind) -> tuple[Call, Tensor, Tensor, Tensor]:
    """(x, gates, index) -> y, and the three."""
    p = case_of(kind, (ROWS,)).p

    def call(x: Tensor, gates: Tensor, index: Tensor) -> Tensor:
        return mixed_low_rank_linear(x, p.weight, p.bias, p.down, p.up, gates, index, 0.5)

    return call, p.x, p.gate, p.index


def compiled(call: Call, *_: Any) -> Call:
    function: Call = torch.compile(call, backend="aot_eager", fullgraph=True)
    return function


def traced(call: Call, *example: Tensor) -> Call:
    function: Call = torch.jit.trace(call, example)
    return function


def exported(call: Call, *example: Tensor) -> Call:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, gates: Tensor, index: Tensor) -> Tensor:
            return call(x, gates, index)

    function: Call = torch.export.export(Module(), example).module()
    return function


@MIXED
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("made", [compiled, traced, exported])
@pytest.mark.parametrize("value", [ADAPTERS, -1, 10**9, -(10**9)])
def test_an_index_out_of_range_is_an_error(value: int, made: Any, kind: Kind) -> None:
    call, x, gates, index = parts(kind)
    function = made(call, x, gates, index)
    torch.testing.assert_close(function(x, gates, index), call(x, gates, index))
    bad = index.clone()
    bad[3] = value
    message = f"index must be from 0 to {ADAPTERS - 1}, got {value}"
    with pytest.raises((ValueError, RuntimeError), match=message):
        function(x, gates, bad)


@MIXED
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_with_one_adapter_is_of_any_number(kind: Kind) -> None:
    call, x, gates, index = parts(kind)
    function = torch.jit.trace(call, (x, gates[:1], 0 * index))
    torch.testing.assert_close(function(x, gates, index), call(x, gates, index))


@MIXED
@pytest.mark.parametrize("adapters", [1, ADAPTERS])
def test_it_is_seen_through(adapters: int, kind: Kind) -> None:
    """By fake tensors, a tracer of operators and vmap, as a call with one gate is."""
    call, x, gates, index = parts(kind)
    gates, index = gates[:adapters], index % adapters
    want = call(x, gates, index)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x), mode.from_tensor(gates), mode.from_tensor(index)
        assert on_fakes(kind, mode, *fake).shape == want.shape
    torch.testing.assert_close(make_fx(call)(x, gates, index)(x, gates, index), want)
    by_row = torch.func.vmap(lambda row, i: call(row[None], gates, i[None])[0])
    torch.testing.assert_close(by_row(x, index), want)


def on_fakes(kind: Kind, mode: FakeTensorMode, x: Tensor, gates: Tensor, index: Tensor) -> Tensor:
    p = case_of(kind, (ROWS,)).p
    weight, bias, down, up = map(mode.from_tensor, (p.weight, p.bias, p.down, p.up))
    return mixed_low_rank_linear(x, weight, bias, down, up, gates, index, 0.5)


@MIXED
def test_an_index_whose_memory_is_gone_is_named(kind: Kind) -> None:
    call, x, gates, index = parts(kind)
    index = index.clone()
    index.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="index must hold data"):
        call(x, gates, index)
