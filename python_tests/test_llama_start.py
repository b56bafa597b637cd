"""The start of a whole model on a CPU: one shape's matrices in memory, only starts are timed."""

from __future__ import annotations

import itertools
import json
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pivot_matrices import gaussian, lapack
from torch import Tensor

from bench import llama, llama_start

TINY = {(48, 32): 2, (16, 32): 2, (80, 32): 2, (32, 80): 1}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "LAYER", TINY)
    monkeypatch.setattr(llama, "LAYERS", 4)


def test_the_model_has_224_matrices() -> None:
    assert llama.LAYERS * sum(llama.LAYER.values()) == 224


def test_only_the_matrices_of_one_shape_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 224 were drawn first: 14 GB, and on many machines the end of the process."""
    drawn: list[weakref.ref[Tensor]] = []
    draw = llama.gaussian

    def noted(rows: int, columns: int, *arguments: object, **options: object) -> Tensor:
        shapes = {tuple(w.shape) for ref in drawn if (w := ref()) is not None}
        assert shapes <= {(rows, columns)}
        weight = draw(rows, columns, *arguments, **options)
        drawn.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(llama, "gaussian", noted)
    list(llama.timed_starts(TINY, lambda _: {"none": len}))
    assert len(drawn) == 7
    assert not any(ref() is not None for ref in drawn)


def test_drawing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(llama, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    draw = llama.gaussian

    def slow(*arguments: object, **options: object) -> Tensor:
        for _ in range(100):
            next(clock)
        return draw(*arguments, **options)

    monkeypatch.setattr(llama, "gaussian", slow)
    timed = list(llama.timed_starts(TINY, lambda _: {"one": len, "other": len}))
    assert [(t.start, t.shape, t.matrices) for t in timed] == [
        (name, shape, count) for shape, count in TINY.items() for name in ("one", "other")
    ]
    assert {t.seconds for t in timed} == {1.0}


def test_each_layer_has_weights_of_its_own(monkeypatch: pytest.MonkeyPatch, tiny: None) -> None:
    started: list[Tensor] = []
    monkeypatch.setattr(llama_start, "_start", lambda rank: started.extend)
    llama_start.streamed_rows([4], layers=3)
    assert len(started) == 21
    assert len({tuple(weight.flatten().tolist()) for weight in started}) == 21


@pytest.mark.parametrize("layers", [1, 4])
def test_the_whole_is_measured_or_said_to_be_extrapolated(
    layers: int, tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--ranks", "3", "5", "--layers", str(layers)]
    begin = time.perf_counter()
    assert llama_start.main([*arguments, "--out", str(tmp_path)]) == 0
    passed = time.perf_counter() - begin
    rows = {
        row["name"]: row for row in json.loads((tmp_path / "llama_start.json").read_text())["rows"]
    }
    for rank in ("rank 3", "rank 5"):
        whole, parts = rows[rank], [rows[f"{shape}, {rank}"] for shape in TINY]
        assert whole["matrices"] == sum(part["matrices"] for part in parts) == 28
        assert whole["measured_matrices"] == 7 * layers
        assert whole["seconds"] == pytest.approx(sum(part["seconds"] for part in parts))
        assert whole["seconds"] == pytest.approx(4 / layers * whole["measured_seconds"])
        assert 0 < whole["measured_seconds"] < passed
        assert {row["extrapolated"] for row in (whole, *parts)} == {layers < 4}
    assert ("seconds of 4 layers are extrapolated from 1" in capsys.readouterr().out) == (
        layers < 4
    )


def test_wrong_pivots_are_not_timed(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llama_start, "first_wrong_pivot", lambda *_: 2)
    assert llama_start.main(["--device", "cpu", "--ranks", "3"]) == 1
    assert "REFUSED" in capsys.readouterr().out


@pytest.mark.parametrize("layers", ["0", "33", "one"])
def test_other_numbers_of_layers_are_refused(layers: str) -> None:
    with pytest.raises(SystemExit):
        llama_start.main(["--device", "cpu", "--layers", layers])


@pytest.mark.parametrize("step", [0, 7, 18])
def test_the_first_wrong_pivot_is_found(step: int) -> None:
    weight = gaussian(50, 40)
    pivots = torch.as_tensor(lapack(weight)[0][:20])
    assert llama_start.first_wrong_pivot(weight, pivots) is None
    pivots[[step, step + 1]] = pivots[[step + 1, step]]
    assert llama_start.first_wrong_pivot(weight, pivots) == step
