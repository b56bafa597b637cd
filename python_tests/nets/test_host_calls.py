"""How many calls Python makes for a forward and a backward, over those of the frozen layer.

Around a small layer they cost more than its arithmetic. The table is keyed by who runs the layer,
since a processor may offer a kernel that another lacks; the counts do not depend on its speed.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels import nn as adapters

FEATURES, RANK = 256, 16
FEW, MANY = 16, 512
LAYERS = {layer.kind: layer for layer in adapters.ADAPTERS.values()}

Limits = dict[tuple[str, str], int]
# (dtype, tokens): (adapter, who runs it): calls beyond those of the frozen layer.
NATIVE: Limits = {("qr", "cpu"): 24, ("lora_xs", "cpu"): 24, ("ohora", "cpu"): 34}
TABLE: dict[tuple[torch.dtype, int], Limits] = {
    (torch.float32, FEW): NATIVE,
    (torch.float64, FEW): NATIVE,
    (torch.float32, MANY): {
        **NATIVE,
        ("qr", "composed"): 59,
        ("lora_xs", "composed"): 63,
        ("ohora", "cpu"): 42,
    },
    (torch.bfloat16, FEW): {
        ("qr", "amx"): 25,
        ("lora_xs", "amx"): 25,
        ("ohora", "amx"): 34,
        **NATIVE,
        ("qr", "composed"): 67,
        ("lora_xs", "composed"): 69,
        # Where the library multiplies no halves the operands are cast to fp32, y and dx back.
        ("qr", "composed, fp32"): 87,
        ("lora_xs", "composed, fp32"): 91,
        ("ohora", "cpu, fp32"): 54,
    },
    (torch.float16, FEW): {
        # Ten of them bring operands to fp32 and back.
        ("qr", "composed"): 210,
        ("lora_xs", "composed"): 214,
        ("ohora", "cpu"): 286,
        ("qr", "composed, fp32"): 220,
        ("lora_xs", "composed, fp32"): 224,
        ("ohora", "cpu, fp32"): 290,
    },
}
# A gradient as a sum gives it, all of whose strides are zero: no native call takes it.
EXPANDED: Limits = {("qr", "cpu"): 106, ("lora_xs", "cpu"): 106, ("ohora", "cpu"): 117}

KEPT = 18  # to ask whether what was computed from frozen tensors still is what they give


def calls(step: Callable[[], None]) -> int:
    """Calls of Python and built-in functions in ``step``, after it ran a few times.

    A collection in the middle would count the finalizers of what other tests left.
    """
    for _ in range(3):
        step()
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    collects = gc.isenabled()
    gc.disable()
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
        if collects:
            gc.enable()
    return count


def own_calls(layer: adapters.AdapterLinear, m: int, expanded: bool = False) -> int:
    """Calls for forward and backward over those of the same layer without its adapter."""
    dtype = layer.weight.dtype
    x = torch.randn(m, FEATURES, dtype=dtype).requires_grad_()
    dy = torch.ones((), dtype=dtype).expand(m, FEATURES)
    if not expanded:
        dy = dy.contiguous()

    def of(module: Callable[[Tensor], Tensor]) -> int:
        def step() -> None:
            module(x).backward(dy)

        return calls(step)

    return of(layer) - of(layer.to_linear(merge=False))


def layer(kind: str, dtype: torch.dtype, **options: bool) -> adapters.AdapterLinear:
    torch.manual_seed(0)
    linear = nn.Linear(FEATURES, FEATURES, dtype=dtype)
    return LAYERS[kind].from_linear(linear, rank=RANK, **options)


def runs(adapted: adapters.AdapterLinear) -> str:
    choice = qk.backends.last_choice(adapted.operation)
    assert choice is not None
    return f"{choice.name}, fp32" if "fp32" in choice.recipe else choice.name


@pytest.fixture(autouse=True)
def _native() -> None:
    if qk.build_config() == {}:
        pytest.skip("without the native core every call takes Python's way")


@pytest.mark.parametrize(("dtype", "m"), TABLE, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_no_more_calls_than_before(kind: str, dtype: torch.dtype, m: int) -> None:
    adapted = layer(kind, dtype)
    own = own_calls(adapted, m)
    limit = TABLE[dtype, m][kind, runs(adapted)]
    assert own <= limit, f"{own} calls beyond the frozen layer's, {limit} before"


@pytest.mark.parametrize("kind", LAYERS)
def test_no_more_calls_for_the_gradient_of_a_sum(kind: str) -> None:
    adapted = layer(kind, torch.float32)
    own = own_calls(adapted, FEW, expanded=True)
    assert own <= EXPANDED[kind, runs(adapted)]


def test_few_calls_to_see_that_a_kept_tensor_is_right() -> None:
    kept, computed = layer("ohora", torch.float32, fold=True), layer("ohora", torch.float32)
    assert own_calls(kept, FEW) <= own_calls(computed, FEW) + KEPT


@pytest.mark.parametrize("kind", LAYERS)
def test_one_more_call_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = layer(kind, torch.float32)
    before = own_calls(adapted, FEW)
    forward = adapted.forward
    monkeypatch.setattr(adapted, "forward", lambda x: forward(x))
    assert own_calls(adapted, FEW) == before + 1


def test_finalizers_of_garbage_are_not_counted() -> None:
    """Once, in a run of all tests, a layer had 292 calls that has 286 in every other."""

    class Garbage:
        def __init__(self) -> None:
            self.itself = self

    finalized: list[object] = []
    waiting: list[object] = []

    def finalize(reference: object) -> None:
        finalized.append(reference)

    def step() -> None:
        waiting.extend([weakref.ref(Garbage(), finalize) for _ in range(100)])

    thresholds = gc.get_threshold()
    gc.collect()
    gc.disable()
    without = calls(step)
    gc.enable()
    gc.set_threshold(10)
    try:
        assert calls(step) == without
    finally:
        gc.set_threshold(*thresholds)
    assert finalized, "nothing was collected in the warm-up: the test shows nothing"


def test_a_layer_that_leaves_the_native_call_is_over_the_limit() -> None:
    adapted = layer("qr", torch.float32)
    with qk.backends.use_backend("cpu"):
        own = own_calls(adapted, FEW)
    assert own > NATIVE["qr", "cpu"] + 50
