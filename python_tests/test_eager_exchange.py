"""What native calls need of torch, how they fail and mix with others, and what they leave."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from typing import Any

import helpers
import pytest
import torch
from helpers import TRAINABLES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qrlora_kernels import backends, native
from qrlora_kernels.dispatch import chooser
from qrlora_kernels.ops import eager

pytestmark = pytest.mark.skipif(not eager.AVAILABLE, reason=native.REASON)

OPS = ("qr_linear", "lora_xs_linear", "kron_linear")
N, K, R = 24, 36, 3
of_each = pytest.mark.parametrize("op", OPS)


class Wrapped(torch.Tensor):
    """A subclass without a behaviour of its own."""


class _Table(ctypes.Structure):
    """DLPack's DLPackExchangeAPI."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("functions", ctypes.c_void_p * 5),
    ]


def _set_torch(table: _Table | None, name: bytes = b"dlpack_exchange_api") -> bool:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = object() if table is None else new(ctypes.addressof(table), name, None)
    return native.CORE.set_torch(
        capsule, Tensor, torch.nn.Parameter, eager._STATES, torch.is_grad_enabled,
        torch.get_num_threads, chooser._last,
    )  # fmt: skip


def _own_table() -> _Table:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = get(Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
    return _Table.from_address(address)


def test_a_torch_without_one_of_the_states_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_STATES", (*eager._STATES, None))
    assert not eager._connect()


def test_unknown_tables_are_refused():
    """No capsule, another name, an unknown major number, no function to read a tensor with."""
    own = _own_table()
    unknown = _Table(own.major + 1, 0, None, own.functions)
    silent = _Table(own.major, own.minor, None, (ctypes.c_void_p * 5)())
    assert not _set_torch(None)
    assert not _set_torch(own, b"another")
    assert not _set_torch(unknown)
    assert not _set_torch(silent)


def test_an_older_table_behind_an_unknown_one_is_found():
    own = _own_table()
    newer = _Table(own.major + 1, 0, ctypes.addressof(own), own.functions)
    assert _set_torch(newer)
    operands = helpers.operands("qr_linear", 7, N, K, R)
    assert helpers.call("qr_linear", operands).shape == (7, N)
    assert eager.CORE.low_rank_forward_call(1, *operands.values(), None, 1.0, None).shape == (7, N)


@of_each
def test_without_the_exchange_everything_works(op, monkeypatch):
    monkeypatch.setattr(Tensor, "__dlpack_c_exchange_api__", None)
    assert not eager._connect()
    monkeypatch.setattr(eager, "AVAILABLE", False)
    operands = helpers.operands(op, 7, N, K, R, torch.float64)
    got = helpers.outcome(helpers.call, op, operands, helpers.gradient_like(op, operands))
    torch.testing.assert_close(got["y"], helpers.exact(op, operands))


@of_each
def test_a_backend_forced_meanwhile_is_not_remembered(op, monkeypatch):
    """Another thread may force one between this call's look at it and its choice."""
    operands = helpers.operands(op, 7, 30, 35, 5, torch.float64)
    tell, meanwhile = eager._tell, contextlib.ExitStack()

    def forced_first(*given: Any) -> None:
        meanwhile.enter_context(backends.use_backend("reference"))
        tell(*given)

    monkeypatch.setattr(eager, "_tell", forced_first)
    chooser.forget()
    with meanwhile:
        helpers.call(op, operands)
        assert chooser.forced_backend() == "reference"
    assert backends.last_choice(op).name == "cpu"
    monkeypatch.undo()
    helpers.call(op, operands)
    assert backends.last_choice(op).name == "cpu"


@of_each
@pytest.mark.parametrize("there", [True, False])
def test_a_checkpoint_may_go_another_way_the_second_time(op, there):
    """A backend is forced around the forward alone, or around its recomputation alone."""
    operands = helpers.operands(op, (2, 5), N, K, R)
    dy = helpers.gradient_like(op, operands)
    want = helpers.outcome(helpers.call, op, operands, dy)
    x = operands["x"].clone().requires_grad_()

    def forced(on: bool) -> contextlib.AbstractContextManager[Any]:
        return backends.use_backend("reference") if on else contextlib.nullcontext()

    with forced(there):
        y = checkpoint(lambda x: helpers.call(op, operands | {"x": x}), x, use_reentrant=False)
    with forced(not there):
        y.backward(dy)
    torch.testing.assert_close(x.grad, want["x"])


@of_each
def test_errors_of_the_chooser_pass_through(op, monkeypatch):
    def fail(_: Any) -> None:
        raise RuntimeError("no choice today")

    monkeypatch.setattr(chooser, "choose_freely", fail)
    with pytest.raises(RuntimeError, match="no choice today"):
        helpers.call(op, helpers.operands(op, 7, 30, 35, 5))
    assert not sys.exc_info()[0]


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


@of_each
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_nothing_leaks(op):
    operands = helpers.operands(op, 16, 64, 64, 8)
    refused = operands | {"x": operands["x"].as_subclass(Wrapped)}
    gate = operands[TRAINABLES[op][0]]
    dy = helpers.gradient_like(op, operands)

    def calls(count: int) -> None:
        for _ in range(count):
            helpers.call(op, operands)
        gate.requires_grad_()
        for _ in range(count // 2):
            torch.autograd.grad(helpers.call(op, operands), gate, dy)
        gate.requires_grad_(False)
        for _ in range(count // 2):
            helpers.call(op, refused)

    def counts() -> list[int]:
        choice = backends.last_choice(op)
        return [sys.getrefcount(t) for t in (*operands.values(), dy, choice, 0.25)]

    calls(1000)
    gc.collect()
    before, resident, blocks = counts(), _resident_bytes(), sys.getallocatedblocks()
    calls(20_000)  # 4 KB of y each
    gc.collect()
    assert counts() == before
    assert sys.getallocatedblocks() - blocks < 5_000
    assert _resident_bytes() - resident < 30e6
