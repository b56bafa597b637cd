"""Backends measured on this machine: what is measured decides, and only right results may win."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
from contests import (  # noqa: F401  fixtures among them
    PROBLEM,
    clock_of_steps,
    model_of,
    nothing_measured,
    only_these,
    same,
    slow_step,
    tune,
)
from torch import nn

import qrlora_kernels as qk
from qrlora_kernels import backends
from qrlora_kernels.dispatch import chooser, contest, tuning
from qrlora_kernels.dispatch.problem import joined, problem_of
from qrlora_kernels.model.tune import Tuning, tune_problems

# --- the table


@pytest.mark.parametrize(("m", "known"), [(7, False), (8, True), (32, True), (33, False)])
def test_an_entry_counts_for_half_to_twice_its_tokens(m, known):
    tuning.add([tuning.entry_for(PROBLEM, "composed")])
    assert (tuning.lookup(PROBLEM._replace(m=m)) is not None) == known


def test_the_nearest_number_of_tokens_counts():
    tuning.add(
        tuning.entry_for(PROBLEM._replace(m=m), name) for m, name in [(8, "cpu"), (16, "amx")]
    )
    assert tuning.lookup(PROBLEM._replace(m=9)).winner == "cpu"
    assert tuning.lookup(PROBLEM._replace(m=13)).winner == "amx"


@pytest.mark.parametrize(
    "other", [{"op": "lora_xs_linear"}, {"dtype": torch.float64}, {"n": 25}, {"k": 37}, {"r": 5}]
)
def test_an_entry_counts_for_its_own_shape_only(other):
    tuning.add([tuning.entry_for(PROBLEM, "composed")])
    assert tuning.lookup(PROBLEM._replace(**other)) is None


def test_an_entry_of_another_chip_does_not_count():
    entry = tuning.entry_for(PROBLEM, "composed")
    tuning.add([entry._replace(chip="another")])
    assert tuning.lookup(PROBLEM) is None


@pytest.mark.parametrize("winner", ["no such backend", "triton"])
def test_a_winner_that_cannot_run_is_passed_over(winner):
    before = backends.choose(PROBLEM)
    tuning.add([tuning.entry_for(PROBLEM, winner)])
    chooser.forget()
    assert backends.choose(PROBLEM) == before


def test_the_nearest_number_of_tokens_counts_whatever_the_format():
    both = tuning.entry_for(PROBLEM._replace(m=8), "composed")._replace(step="", layout="")
    tuning.add([both, tuning.entry_for(PROBLEM._replace(m=16), "reference")])
    assert tuning.lookup(PROBLEM._replace(m=8)).winner == "composed"
    assert tuning.lookup(PROBLEM._replace(m=15)).winner == "reference"


# --- measuring


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", ["qr", "lora_xs", "ohora"])
def test_every_problem_gets_its_winner(adapter, dtype):
    model = model_of(adapter, dtype)
    found = tune(model, (1, 5))
    assert len(found.contests) == 8  # two layers, two numbers of tokens, two steps
    for one in found.contests:
        assert not one.left_out
        assert one.winner in one.seconds
        assert any(name.startswith("composed:") for name in one.seconds)
        choice = backends.choose(one.problem)
        assert f"{choice.backend}:{choice.recipe}" == one.winner
        assert choice.reason.startswith("measured on this")
    for layer in qk.adapted_layers(model).values():
        for step in ("fwd", "bwd"):
            assert layer.explain(5, step).reason.startswith("measured on this")
            assert not layer.explain(100, step).reason.startswith("measured on this")
    assert str(found).count("tokens") == 8


def test_the_fastest_is_chosen_and_the_call_takes_it(only, slow):
    model = model_of()
    only({"cpu": slow, "triton": same, "composed": slow})
    assert backends.choose(PROBLEM).name == "cpu"
    found, *_ = tune(model).contests
    assert found.winner == "triton:test"
    assert found.rules == "cpu:test"
    assert next(iter(found.seconds)) == "triton:test"
    model(torch.randn(3, 32))
    assert backends.last_choice("qr_linear").name == "triton"
    assert "of" in backends.last_choice("qr_linear").reason


def test_a_near_tie_and_an_uncertain_lead_change_nothing(only, monkeypatch):
    only({"cpu": same, "composed": same})

    def winner(of_cpu: list[float]) -> str:
        samples = {"cpu:test": [1e-4 * t for t in of_cpu], "composed:test": [1e-4] * 8}
        monkeypatch.setattr(contest, "_time", lambda *_: samples)
        return tune(model_of()).contests[0].winner.removesuffix(":test")

    assert winner([1.019] * 8) == "cpu"
    assert winner([1.5] * 5 + [0.9] * 3) == "cpu"
    assert winner([1.03] * 6 + [0.9] * 2) == "composed"
    assert winner([1.019] * 8) == "cpu", "what was measured before is no choice to replace"


def _broken(name: str, results: Any) -> Any:
    raise RuntimeError("out of shared memory\nand more")


def _off(part: int) -> Callable[..., Any]:
    def change(name: str, results: Any) -> Any:
        if not name.endswith("bwd" if part else "fwd"):
            return results
        first, *rest = results
        return (first * 1.001, *rest) if part < 2 else (first, rest[0] * 1.001, *rest[1:])

    return change


OFF_Y = _off(0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_broken, "RuntimeError: out of shared memory"),
        (OFF_Y, "results differ"),
        (_off(1), "results differ"),
        (_off(2), "results differ"),
        (lambda name, results: tuple(t * float("nan") for t in results), "results differ"),
    ],
    ids=["raises", "y", "dx", "dlam", "nan"],
)
def test_what_is_wrong_never_wins(only, slow, change, why):
    """However fast, and although it is preferred."""
    only({"triton": change, "composed": slow})
    found = tune(model_of()).contests[0 if change in (_broken, OFF_Y) else 1]
    assert found.winner == "composed:test"
    assert found.left_out["triton:test"].startswith(why)
    assert "\n" not in found.left_out["triton:test"]
    assert "left out triton:test" in str(Tuning([found]))


def test_plain_calls_choose_again():
    """The native core keeps choices of its own: it has to hear of the measurement."""
    operands = helpers.operands("qr_linear", 16, 24, 36, 4)
    want = helpers.call("qr_linear", operands)
    assert backends.last_choice("qr_linear").name != "reference"
    tuning.add([tuning.entry_for(PROBLEM, "reference", "another", 0.5)])
    chooser.forget()
    torch.testing.assert_close(helpers.call("qr_linear", operands), want, rtol=1e-5, atol=1e-5)
    choice = backends.last_choice("qr_linear")
    assert choice.name == "reference"
    assert choice.reason.endswith("with 16 tokens: 0.50 of another's time")


def test_a_forced_backend_stays_forced():
    tuning.add([tuning.entry_for(PROBLEM, "composed")])
    assert backends.choose(PROBLEM, "reference").name == "reference"
    with backends.use_backend("reference"):
        assert backends.choose(PROBLEM).name == "reference"


def test_layers_that_add_their_update_are_measured_as_they_run():
    """With dropout in training the operation is another one."""
    model = model_of("qr", dropout=0.5).train()
    assert {c.problem.op for c in tune(model).contests} == {"linear_add"}
    layer = next(iter(qk.adapted_layers(model).values()))
    assert layer.explain(3).reason.startswith("measured on this")
    layer(torch.randn(3, layer.in_features))
    assert backends.last_choice("linear_add") == layer.explain(3)


def test_autocast_is_measured_as_it_runs():
    model = model_of()
    with torch.autocast("cpu", torch.bfloat16):
        assert {c.problem.dtype for c in tune(model).contests} == {torch.bfloat16}
        model(torch.randn(3, 32))
    assert backends.last_choice("qr_linear").reason.startswith("measured on this")


def test_measuring_leaves_no_trace_but_its_result():
    before = dict(chooser._last)
    tune(model_of())
    assert chooser._last == before


def test_wrong_arguments_are_named():
    model = model_of()
    with pytest.raises(TypeError, match="tokens must be a sequence of integers, got 5"):
        qk.tune(model, 5)
    with pytest.raises(ValueError, match="seconds must be positive, got '1'"):
        qk.tune(model, (1,), seconds="1")
    with pytest.raises(ValueError, match="model must be on a CPU or CUDA device, got meta"):
        qk.tune(model_of().to("meta"), (1,))
    with pytest.raises(ValueError, match="adapted layers that are not merged, got none"):
        qk.tune(qk.merge(model_of()), (1,))
    for tokens in ((), (0,), (1.5,), (True,)):
        with pytest.raises(ValueError, match="tokens must be positive integers, got"):
            qk.tune(model, tokens)
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        qk.tune(model, (1,), seconds=0)
    with pytest.raises(ValueError, match="must hold adapted layers"):
        qk.tune(nn.Linear(2, 2), (1,))
    with (
        backends.use_backend("composed"),
        pytest.raises(ValueError, match="forced while tuning, got 'composed'"),
    ):
        qk.tune(model, (1,))


@pytest.mark.parametrize(
    "change", [{"gate": "mixed_core", "op": "low_rank"}, {"form": "output"}], ids=str
)
def test_problems_that_no_contest_is_held_for_are_refused(change):
    with pytest.raises(ValueError, match="one gate and the two-sided form, got gate"):
        tune_problems([PROBLEM._replace(**change)], seconds=0.001, progress=False)


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_the_weight_of_a_contest_lies_as_the_problem_says(layout):
    asked = joined(PROBLEM._replace(layout=layout))
    assert problem_of(contest._operands(asked)) == asked
