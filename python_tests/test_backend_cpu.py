"""The native CPU kernels keep the contract, on every instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from backend_contract import Contract, check_error_rule, draw

from qrlora_kernels import native
from qrlora_kernels.backends import amx, cpu

needs_core = pytest.mark.skipif(native.CORE is None, reason=native.REASON)


class TestCPU(Contract):
    backend = cpu
    ops = ("kron_linear",)


class TestAMX(Contract):
    backend = amx
    dtypes = (torch.bfloat16,)


@pytest.mark.parametrize(
    ("backend", "name", "dtype"),
    [
        (cpu, "kron_linear", torch.float32),
        (cpu, "kron_linear", torch.bfloat16),
        (amx, "qr_linear", torch.bfloat16),
        (amx, "lora_xs_linear", torch.bfloat16),
        (amx, "kron_linear", torch.bfloat16),
    ],
)
def test_same_bits_for_every_number_of_threads(
    backend: ModuleType, name: str, dtype: torch.dtype
) -> None:
    ok, reason = backend.available()
    if not ok:
        pytest.skip(reason)
    op = draw(name, 300, 96, 160, 16, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            if backend is cpu:  # the base product is the library's own
                results.append(
                    (
                        cpu.kron_update(op.x, *op._factors(), 0.7),
                        *cpu.kron_gradients(op.dy, op.x, *op._factors(), 0.7, True, True, True),
                    )
                )
            else:
                results.append(tuple(op.run(backend).values()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_core
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets(isa: str) -> None:
    """In a process of its own, because the choice is made once."""
    code = (
        "import torch\n"
        "from backend_contract import check_error_rule, draw\n"
        "from qrlora_kernels.backends import amx, cpu\n"
        "assert not amx.available()[0]\n"
        "for dtype in (torch.float64, torch.float32, torch.bfloat16):\n"
        "    for shape in ((7, 33, 3, 3), (40, 96, 160, 16), (40, 300, 450, 150)):\n"
        "        op = draw('kron_linear', *shape, dtype)\n"
        "        check_error_rule(cpu, op)\n"
    )
    here = os.path.dirname(__file__)
    path = os.pathsep.join(filter(None, (here, os.path.dirname(here), os.getenv("PYTHONPATH"))))
    env = {**os.environ, "QRLORA_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_core
def test_amx_tiles_are_given_back_to_the_library() -> None:
    """oneDNN's own AMX products agree before, between and after ours."""
    if not amx.available()[0]:
        pytest.skip(amx.available()[1])
    op = draw("qr_linear", 128, 256, 256, 16, torch.bfloat16)
    before = op.x @ op.weight.mT
    for _ in range(3):
        check_error_rule(amx, op)
        assert torch.equal(op.x @ op.weight.mT, before)


@needs_core
def test_many_tokens_in_the_core_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contraction over tokens is cut into parts that are added in order."""
    if not amx.available()[0]:
        pytest.skip(amx.available()[1])
    monkeypatch.setattr(amx, "_TOKENS", 64)
    op = draw("lora_xs_linear", 300, 48, 80, 16, torch.bfloat16, train_dtype=torch.float32)
    check_error_rule(amx, op)
