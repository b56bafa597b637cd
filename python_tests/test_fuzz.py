"""Random calls with operands that are not what they seem, in a child process that may die."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch

from qrlora_kernels.native import pointers
from qrlora_kernels.ops import eager

ROOT = Path(__file__).parents[1]
CALLS = 600  # `make fuzz` makes 10,000 others


def test_no_call_ends_the_process_or_is_silently_wrong(tmp_path: Path) -> None:
    note = tmp_path / "call"
    command = [sys.executable, "python_tests/fuzz.py", f"--calls={CALLS}", f"--note={note}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode < 0:
        pytest.fail(f"ended by signal {-done.returncode} at\n{note.read_text()}\n{done.stderr}")
    assert done.returncode == 0, done.stdout + done.stderr


def _call(worn: dict[str, str], backend: str | None, **changes: Any) -> fuzz.Call:
    call = fuzz.Call("qr_linear", torch.float32, (24, 36, 3), (7,), backend, worn, False, 0)
    return call._replace(**changes)


BACKENDS = ([None] if eager.AVAILABLE else []) + (["cpu"] if eager.CORE is not None else [])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "q", "lam"])
def test_a_negation_that_nobody_asks_for_is_found(name, backend, monkeypatch):
    call = _call({name: "negated"}, backend)
    assert fuzz.run(call) == "right"
    monkeypatch.setattr(torch.Tensor, "is_neg", lambda self: False)
    with pytest.raises(fuzz.Wrong, match="y: off by"):
        fuzz.run(call)


@pytest.mark.skipif(eager.CORE is None, reason="without native kernels there are no addresses")
@pytest.mark.parametrize("disguise", ["freed", "functional"])
def test_a_null_pointer_that_is_read_as_absent_is_found(disguise, monkeypatch):
    call = _call({"bias": disguise}, "cpu")
    assert fuzz.run(call) == "refused"
    monkeypatch.setattr(pointers, "_check_memory", lambda t, name: None)
    with pytest.raises(fuzz.Wrong, match="bias: "):
        fuzz.run(call)


def test_a_refusal_without_need_is_found(monkeypatch):
    def refuse(*_: Any) -> None:
        raise TypeError("x must be something else")

    monkeypatch.setattr(pointers, "_check_memory", refuse)
    with pytest.raises(fuzz.Wrong, match="refused"):
        fuzz.run(_call({"x": "negated"}, "reference"))


def test_every_disguise_and_operand_is_drawn():
    calls = [fuzz.drawn(seed) for seed in range(CALLS)]
    assert {d for call in calls for d in call.worn.values()} == set(fuzz.DISGUISES)
    assert {name for call in calls for name in call.worn} >= {"x", "weight", "bias", "dy", "a0"}
    assert {call.op for call in calls} == {*fuzz.OPS, *fuzz.STARTS}
