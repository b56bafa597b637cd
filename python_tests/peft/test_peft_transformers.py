"""transformers' own methods for adapters.

Most ask for peft >= 0.22, for LoRA as much as for us; with an older one that check is lowered here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import bert, config, layers, move, predictions, refusal, tokens
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.integrations import peft as integration

ADAPTERS = ["qr", "lora_xs", "ohora"]


@pytest.fixture(autouse=True)
def with_the_version_check_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.21.0")


def _with_two(adapter: str) -> Any:
    """ "one", moved, and "two", moved otherwise and active."""
    model = bert()
    for seed, name in enumerate(("one", "two")):
        model.add_adapter(config(adapter), name)
        move(model, seed)
    return model


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_added_switched_disabled_and_deleted(adapter: str) -> None:
    plain = predictions(bert())
    model = bert()
    model.add_adapter(config(adapter), "one")
    torch.testing.assert_close(predictions(model), plain)
    move(model)
    one = predictions(model)
    model.add_adapter(config(adapter), "two")
    assert model.active_adapters() == ["two"]
    trains = {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad}
    assert "one" not in trains
    assert "two" in trains
    torch.testing.assert_close(predictions(model), plain)
    model.set_adapter("one")
    assert torch.equal(predictions(model), one)
    model.disable_adapters()
    assert torch.equal(predictions(model), plain)
    model.enable_adapters()
    assert torch.equal(predictions(model), one)
    model.delete_adapter("two")
    assert {name for layer in layers(model).values() for name in layer.r} == {"one"}
    assert torch.equal(predictions(model), one)
    model.delete_adapter("one")
    assert refusal(model.active_adapters) == "No adapter loaded. Please load an adapter first."
    assert torch.equal(predictions(model), plain)


@pytest.mark.parametrize("save_factors", [False, True], ids=["", "factors"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_injected_model_saves_its_adapter_alone(
    adapter: str, save_factors: bool, tmp_path: Path
) -> None:
    bert().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model.add_adapter(config(adapter, save_factors=save_factors), "mine")
    move(model)
    want = predictions(model)
    state = model.get_adapter_state_dict("mine")
    assert all(layers(model).keys() & {name.rsplit(".", 1)[0]} for name in state)
    model.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["file_format"] == 1
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(predictions(again), want)
    other = bert()
    other.load_adapter(peft_config=config(adapter), adapter_state_dict=state, adapter_name="x")
    assert torch.equal(predictions(other), want)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_loaded_adapter_trains_only_when_it_is_asked_to(adapter: str, tmp_path: Path) -> None:
    model = _with_two(adapter)
    model.set_adapter("one")
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = bert()
        loaded.load_adapter(str(tmp_path), is_trainable=trainable)
        trains = [n for n, p in loaded.named_parameters() if p.requires_grad and "qk" in n]
        assert bool(trains) == trainable
        assert torch.equal(predictions(loaded), predictions(model))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_trainer_saves_the_adapter_of_an_injected_model(adapter: str, tmp_path: Path) -> None:
    """Which it then does not resume, LoRA's neither: get_peft_model is the way to train."""
    rows = [{"input_ids": row, "labels": row[0] % 3} for row in tokens()]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, learning_rate=0.05, use_cpu=True, report_to=[]
    )
    model = bert()
    model.add_adapter(config(adapter))
    Trainer(model, arguments, train_dataset=rows).train()
    assert not list((tmp_path / "checkpoint-2").glob("model*"))
    loaded = bert()
    loaded.load_adapter(str(tmp_path / "checkpoint-2"))
    assert torch.equal(predictions(loaded), predictions(model))
    assert not torch.allclose(predictions(loaded), predictions(bert()))
