"""What other work on the machine does to measured times is not taken for the backends' own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from contests import (  # noqa: F401  fixtures among them
    CPU,
    PROBLEM,
    clock_of_steps,
    nothing_measured,
    only_these,
    same,
    taking,
)

from qrlora_kernels.backends import Problem
from qrlora_kernels.dispatch import contest, tuning
from qrlora_kernels.model.tune import Tuning, tune_problems


def tuned(problem: Problem, **options: Any) -> Any:
    (found,) = tune_problems([problem], seconds=0.001, progress=False, **options).contests
    return found


SMALL = Problem("qr_linear", CPU, torch.float32, 16, 128, 128, 4)


@pytest.mark.parametrize("busy", ["fastest", "rules"])
def test_absurd_times_are_not_used(only, clock, busy, tmp_path):
    """24 ms for a layer of 128 x 128 went into the file, which later processes obey."""
    absurd = taking(clock, lambda: 12e-3)
    quiet = taking(clock, lambda: 1e-4)
    only({"cpu": absurd, "composed": absurd if busy == "fastest" else quiet})
    tuning.add([tuning.entry_for(SMALL, "composed", "cpu", 0.5)])
    path = tmp_path / "tuning.json"
    tuning.write(path)
    before = path.read_bytes()
    with pytest.warns(UserWarning, match=r"times of 1 of 1 problems cannot be .* took 13 ms"):
        found = tuned(SMALL, path=path)
    assert found.doubt.endswith("3.28 ms are enough on a slow machine")
    assert path.read_bytes() == before
    assert tuning.lookup(SMALL).over == 0.5
    text = str(Tuning([found]))
    assert "not used; µs: " in text
    assert "cannot be believed: " in text


@pytest.mark.parametrize(
    ("rounds", "used"),
    [
        ([1e-4] * 8, True),
        ([1e-4] * 3 + [1.9e-4] * 5, True),
        ([1e-4] * 3 + [2.1e-4] * 5, False),
        ([1e-4] * 5 + [5e-2] * 3, True),  # most rounds were quiet
        ([1e-4] + [5e-2] * 7, False),
    ],
)
@pytest.mark.parametrize("composed_takes", [1e-5, 1e-2], ids=["rules_second", "rules_first"])
def test_uneven_rounds_are_not_used(only, monkeypatch, rounds, used, composed_takes):
    only({"cpu": same, "composed": same})
    samples = {"cpu:test": rounds, "composed:test": [composed_takes] * 8}
    monkeypatch.setattr(contest, "_time", lambda *_: samples)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = tuned(PROBLEM)
    assert found.rules == "cpu:test"
    assert (found.doubt == "") == (not said) == (tuning.lookup(PROBLEM) is not None) == used


@pytest.mark.parametrize("rounds", [[1.0] * 8, [1e-3] + [2.5e-3] * 7])
def test_who_does_not_decide_may_be_slow_and_uneven(only, monkeypatch, rounds):
    only({"cpu": same, "composed": same})
    monkeypatch.setattr(
        contest, "_time", lambda *_: {"cpu:test": [1e-4] * 8, "composed:test": rounds}
    )
    assert not tuned(PROBLEM).doubt


def test_a_doubtful_measurement_is_taken_again(only, monkeypatch):
    only({"cpu": same, "composed": same})
    quiet, busy = {"cpu:test": [1e-4] * 8}, {"cpu:test": [0.1] * 8}
    following = [busy, busy, quiet, busy]
    monkeypatch.setattr(contest, "_time", lambda *_: following.pop(0))
    assert not tuned(PROBLEM).doubt
    assert following == [busy]
    following[:] = [busy] * 4
    with pytest.warns(UserWarning, match="cannot be believed"):
        assert tuned(PROBLEM).doubt
    assert following == [busy]
    assert tuning.lookup(PROBLEM).winner == "cpu", "the good one from before"


def test_one_doubtful_problem_takes_no_other_along(only, monkeypatch, tmp_path):
    only({"cpu": same, "composed": same})
    following = [[0.1], [1e-4], [0.1], [0.1], [0.1]]
    monkeypatch.setattr(contest, "_time", lambda *_: {"cpu:test": following.pop(0) * 8})
    path, other = tmp_path / "tuning.json", PROBLEM._replace(n=25)
    with pytest.warns(UserWarning, match="times of 1 of 2 problems"):
        tune_problems([PROBLEM, other], path=path, seconds=0.001, progress=False)
    tuning.clear()
    tuning.read(path)
    assert [e.n for e in tuning.entries()] == [PROBLEM.n]


@pytest.mark.parametrize(
    ("change", "least_ms"),
    [
        # The least of the rounds, forward and backward, on two cores with AVX2, which has no
        # instructions for halves.
        ({}, 0.16),
        ({"op": "kron_linear"}, 0.59),
        ({"m": 1, "n": 1024, "k": 1024, "dtype": torch.float64}, 0.5),
        ({"m": 512, "n": 1024, "k": 1024}, 32.0),
        ({"m": 1, "n": 1024, "k": 1024, "dtype": torch.bfloat16}, 19.8),
        ({"m": 512, "n": 1024, "k": 1024, "dtype": torch.float16}, 1316.0),
    ],
)
def test_what_a_machine_takes_at_its_best_is_believed(change, least_ms):
    for step, share in (("fwd", 1 / 3), ("bwd", 2 / 3)):
        problem = SMALL._replace(**change, step=step)
        assert not contest._doubt(problem, [share * least_ms / 1e3] * 8)
