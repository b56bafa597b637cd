"""The example on a tiny encoder: every method, the reload check, interruption, warm-up, table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetuning import adapters, report, run, training
from finetuning.memory import peak_memory
from finetuning.methods import METHODS
from finetuning.metrics import scores
from finetuning.model import load_model
from finetuning.settings import Settings
from safetensors.torch import load_file
from tiny_encoder import make_settings, write_model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def settings(tmp_path, tiny_model) -> Settings:
    return make_settings(tmp_path, tiny_model)


# Numbers that a rank of 4 trains in four layers of 32 x 32.
TRAINED = {
    "none": 0,
    "qr": 4 * 4,
    "lora_xs": 4 * 4**2,
    "ohora": 4 * (32 + 32),
    "lora": 4 * 4 * (32 + 32),
    "dora": 4 * (4 * (32 + 32) + 32),
    "pissa": 4 * 4 * (32 + 32),
    "olora": 4 * 4 * (32 + 32),
    "svd_lora": 4 * 4 * (32 + 32),
    "vera": 4 * (4 + 32),
}


@pytest.mark.parametrize("adapter", METHODS)
def test_a_run_trains_saves_and_reloads_the_same_predictions(settings, adapter, capsys):
    ranked = "rank" in METHODS[adapter].options
    result = run.fine_tune(
        replace(settings, adapter=adapter, options={"rank": 4} if ranked else {})
    )
    assert len(result["losses"]) == 2 * 7
    assert len(result["scores"]) == len(result["seconds_an_epoch"]) == 2
    whole = sum(p.numel() for p in load_model(settings.model, 2, 0).encoder.parameters())
    own = adapter.removesuffix("_peft")  # which trains as many numbers through PEFT
    assert result["trained"] == (whole if adapter == "full" else TRAINED[own])
    assert result["head"] == 2 * 33
    assert result["reload_difference"] == 0.0
    assert "24 predictions agree bit for bit" in capsys.readouterr().out
    path = settings.adapter_file
    assert result["adapter_bytes"] == path.stat().st_size
    assert json.loads(settings.result_file.read_text()) == json.loads(json.dumps(result))
    assert {p.name for p in settings.out.iterdir()} == {path.name, settings.result_file.name}


def test_a_run_depends_on_its_seed_alone(settings):
    first = run.fine_tune(settings)
    assert run.fine_tune(settings)["losses"] == first["losses"]
    assert run.fine_tune(replace(settings, seed=1))["losses"] != first["losses"]


def test_qr_lora_results_hold_the_whole_spectrum(settings):
    layers = run.fine_tune(settings)["layers"]
    assert len(layers) == 4
    for layer in layers.values():
        assert len(layer["spectrum"]) == 32
        assert layer["rank"] == len(layer["lam"])
        kept = [value > 0.5 * layer["spectrum"][0] for value in layer["spectrum"]]
        assert sum(kept) == layer["rank"]
        assert any(value != 0.0 for value in layer["lam"])


@pytest.mark.parametrize("adapter", ["qr", "lora"])
def test_an_adapter_that_reloads_differently_fails_loudly(settings, adapter, monkeypatch):
    settings = replace(settings, adapter=adapter, options={"rank": 4})
    save = adapters.save

    def save_something_else(model: torch.nn.Module, settings: Settings) -> None:
        with torch.no_grad():
            trained = (n for n, p in model.named_parameters() if p.requires_grad)
            parameter = model.get_parameter(next(n for n in trained if "head" not in n))
            kept = parameter.clone()
            parameter.mul_(-3.0)
            save(model, settings)
            parameter.copy_(kept)

    monkeypatch.setattr(adapters, "save", save_something_else)
    with pytest.raises(run.ReloadError, match="must predict as the trained model does"):
        run.fine_tune(settings)


def _interrupt_after(batches: int) -> Callable[..., Any]:
    predict_batch, count = training.predict_batch, iter(range(batches))

    def stop(*args: Any) -> Any:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return predict_batch(*args)

    return stop


@pytest.mark.parametrize("batches", [11, 15], ids=["training", "evaluation"])
def test_an_interrupted_run_leaves_the_last_complete_adapter(settings, monkeypatch, batches):
    # Seven batches and one of evaluation are an epoch; the second is cut short.
    monkeypatch.setattr(training, "predict_batch", _interrupt_after(batches))
    with pytest.raises(run.Interrupted, match=r"adapter.safetensors holds the adapter of epoch 1"):
        run.fine_tune(replace(settings, epochs=3))
    monkeypatch.undo()
    left = load_file(settings.adapter_file)
    assert [p.name for p in settings.out.iterdir()] == [settings.adapter_file.name]
    base = run.fresh_model(run.read_tsv(settings.train_file, settings.eval_file), settings)
    adapters.load(base, settings)
    # The same adapter as the first of three epochs writes.
    saved: list[dict[str, torch.Tensor]] = []
    save = adapters.save

    def keep(model: torch.nn.Module, settings: Settings) -> None:
        save(model, settings)
        saved.append(load_file(settings.adapter_file))

    monkeypatch.setattr(adapters, "save", keep)
    run.fine_tune(replace(settings, epochs=3))
    assert saved[0].keys() == left.keys()
    assert all(torch.equal(saved[0][name], tensor) for name, tensor in left.items())
    assert not torch.equal(saved[1]["head.weight"], left["head.weight"])


def test_an_interruption_in_the_first_epoch_says_that_nothing_was_saved(settings, monkeypatch):
    monkeypatch.setattr(training, "predict_batch", _interrupt_after(3))
    with pytest.raises(run.Interrupted, match="nothing was saved"):
        run.fine_tune(settings)
    assert not settings.adapter_file.exists()


def test_a_diverging_run_is_an_error(settings):
    with pytest.raises(FloatingPointError, match="smaller --lr"):
        run.fine_tune(replace(settings, lr=1e30))


def test_settings_refuse_what_cannot_run(settings):
    with pytest.raises(ValueError, match="'nonsense'"):
        replace(settings, adapter="nonsense")
    with pytest.raises(ValueError, match=r"'lora' takes the options .*, got also \['tau'\]"):
        replace(settings, adapter="lora", options={"tau": 0.5})
    with pytest.raises(ValueError, match="'last:4', got 'last:0'"):
        replace(settings, layers="last:0")
    with pytest.raises(ValueError, match="warmup_epochs must be at least 0, got -1"):
        replace(settings, warmup_epochs=-1)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        replace(settings, epochs=0)


def test_batches_cover_every_row_once_and_group_lengths(settings):
    lengths = torch.randint(3, 30, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    inputs = {"input_ids": [[1] * length for length in lengths]}
    data = training.Encoded(None, inputs, torch.zeros(500))
    batches = training.shuffled(data, 8, torch.Generator().manual_seed(0))
    assert sorted(row for rows in batches for row in rows) == list(range(500))
    padded = sum(len(rows) * max(map(data.length, rows)) for rows in batches)
    assert padded < 1.15 * sum(lengths)


def test_a_single_output_is_scored_as_a_regression():
    target = torch.tensor([0.0, 1.0, 2.0]).double().numpy()
    assert scores(2 * target[:, None] - 1, target) == pytest.approx({"pearson": 1, "spearman": 1})


def test_the_table_has_a_row_a_method_with_the_spread_over_seeds(settings):
    results = [
        run.fine_tune(replace(settings, adapter=name, seed=seed))
        for name in ("none", "qr")
        for seed in (0, 1, 2)
    ]
    lines = report.table(results).splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[:4]]
    assert [row[1] for row in cells[2:]] == ["head only", "QR-LoRA"]
    assert lines[4] == ""
    assert len({len(line) for line in lines[:4]}) == 1
    accuracies = [r["scores"][-1]["accuracy"] for r in results[3:]]
    deviation = np.std(accuracies, ddof=1)
    assert cells[3][2] == f"{np.mean(accuracies):.3f} ± {deviation:.3f}"
    assert deviation > 0.0
    assert cells[3][4] == f"{results[3]['trained']:,}"
    assert "seeds 0, 1, 2" in lines[5]
    assert "±" not in report.table(results[:1])


def test_peak_memory_sees_a_large_tensor():
    before = peak_memory()
    assert before is not None
    torch.ones(before + 2**26, dtype=torch.uint8).max()
    peak = peak_memory()
    assert peak is not None
    assert peak > before + 2**26
