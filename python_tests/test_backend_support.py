"""Which backend runs which gate, form and dtype, as one table, and why it refuses the others."""

from __future__ import annotations

import itertools
from types import ModuleType, SimpleNamespace

import pytest
import torch
from backend_contract import refusal
from cases import KRON, LOW_RANK, Kind
from helpers import DTYPES

from qrlora_kernels import native
from qrlora_kernels.backends import BACKENDS, amx, cpu, cuda, triton
from qrlora_kernels.dispatch import chooser

FP16, BF16, FP32, FP64 = DTYPES
ALL, WIDE, NONE = DTYPES, (FP32, FP64), ()
# By backend the dtypes of: λ and C, mixed ones, then both in the output form, and OHoRA.
SUPPORTED = {
    "reference": (ALL, ALL, ALL, ALL, ALL),
    "composed": (ALL, ALL, WIDE, WIDE, ALL),
    "cpu": ((BF16, FP32, FP64), WIDE, NONE, NONE, ALL),
    "amx": ((BF16,), NONE, NONE, NONE, (BF16,)),
    "triton": ((FP16, BF16, FP32), NONE, NONE, NONE, (FP16, BF16)),
    "cuda": ((FP16, BF16), NONE, NONE, NONE, NONE),
}
OTHERS = {"cuda": "cuda"}  # a device that is not the CPU
# What a refusal says where the dtype would do.
REASONS = {
    ("composed", "output"): "needs a kernel that keeps x Wᵀ in fp32 until h is made",
    ("cpu", "output"): "no native kernel for the output form",
    ("cpu", "mixed"): "no native kernel for mixed gates in bf16",
    ("amx", "output"): "no AMX kernel for the output form",
    ("amx", "mixed"): "no AMX kernel for the output form and for mixed gates",
    ("triton", "output"): "output form",
    ("triton", "mixed"): "mixed gates",
    ("cuda", "output"): "no CUDA kernel for mixed gates and for the output form",
    ("cuda", "mixed"): "no CUDA kernel for mixed gates",
}


def _expected(backend: str, kind: Kind) -> tuple[torch.dtype, ...]:
    if kind == KRON:
        return SUPPORTED[backend][4]
    return SUPPORTED[backend][2 * (kind.form == "output") + kind.gate.startswith("mixed")]


@pytest.fixture(autouse=True)
def _as_if_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends answer as they would on a machine that has what they need."""
    for module in (amx, cuda):
        monkeypatch.setattr(module, "available", lambda: (True, ""))
    monkeypatch.setattr(native, "runs_on", lambda device: (True, ""))
    monkeypatch.setattr(triton, "available", lambda: (True, "(TRITON_INTERPRET)"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def _module(backend: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if backend == "cuda":
        core = SimpleNamespace(cuda_decode_tokens=16)
        monkeypatch.setattr(native, "core", lambda: core)
    if backend == "triton":
        pytest.importorskip("triton")
        from qrlora_kernels.backends.triton import common

        chip = common.Chip(capability=90, multiprocessors=4, shared=227 << 10)
        monkeypatch.setattr(common, "chip_of", lambda device: chip)
    if backend in ("cpu", "amx") and native.CORE is None:
        pytest.skip(native.REASON)
    return chooser.load(backend)


def test_the_table_holds_every_backend() -> None:
    assert set(SUPPORTED) == set(BACKENDS)


@pytest.mark.parametrize("backend", SUPPORTED)
@pytest.mark.parametrize("step", ["fwd", "bwd"])
def test_what_is_supported_is_in_the_table(
    backend: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _module(backend, monkeypatch)
    for kind, dtype in itertools.product((KRON, *LOW_RANK), DTYPES):
        why_not = refusal(module, kind, dtype, step, OTHERS.get(backend, "cpu"))
        if backend == "cuda" and step == "bwd":
            assert why_not is not None, (kind, dtype)
            continue
        assert (why_not is None) == (dtype in _expected(backend, kind)), (kind, dtype, why_not)


@pytest.mark.parametrize("backend", SUPPORTED)
def test_a_refusal_says_what_is_missing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By form and gate where these are what is missing, by dtype otherwise."""
    module = _module(backend, monkeypatch)
    for kind, dtype in itertools.product(LOW_RANK, DTYPES):
        why_not = refusal(module, kind, dtype, "fwd", OTHERS.get(backend, "cpu"))
        if why_not is None:
            continue
        if dtype not in SUPPORTED[backend][0]:  # whatever the gate and the form
            assert str(dtype) in why_not or "mixed gates" in why_not, (kind, dtype, why_not)
        else:
            what = "output" if kind.form == "output" else "mixed"
            assert REASONS[backend, what] in why_not, (kind, dtype, why_not)


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_native_kernels_run_on_the_cpu_alone(device: str) -> None:
    for module, kind in itertools.product((cpu, amx), (KRON, *LOW_RANK)):
        assert "CPU" in str(refusal(module, kind, BF16, "fwd", device))
