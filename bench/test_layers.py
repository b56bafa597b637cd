"""The layer suite as pytest-benchmark sees it: ``pytest bench --benchmark-only``.

Saving and comparing are its own: ``--benchmark-autosave``, ``--benchmark-compare``.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from bench.competitors import Layer, layers_for
from bench.problem import LayerProblem, Unavailable
from bench.registry import ADAPTERS, CASES, Case
from bench.suites.common import Gates
from bench.suites.layer import training

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASE = cast(Case, CASES[DEVICE]["layer"]["quick"][0])


@pytest.fixture(scope="module")
def gates() -> Gates:
    return Gates(LayerProblem(CASE, DEVICE))


@pytest.mark.parametrize("layer", layers_for(), ids=lambda layer: layer.key.replace(" ", "-"))
def test_forward_and_backward(layer: Layer, gates: Gates, benchmark: Any) -> None:
    try:
        runner = layer.start(gates.problem)
    except Unavailable as reason:
        pytest.skip(str(reason))
    if layer.adapter in ADAPTERS and runner.equal:
        verdict = gates.judge(layer, runner)
        assert verdict.ok, verdict.detail
    benchmark.group = str(CASE)
    phases = training(runner, gates.problem)
    forward, backward = phases["forward"], phases["backward"]

    def step() -> None:
        backward(forward(None))
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(step)
