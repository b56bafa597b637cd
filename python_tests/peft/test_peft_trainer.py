"""Trainer and accelerate over the PEFT methods: small checkpoints, resumed to the bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft_models import bert, config, layers, predictions, tokens
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

ADAPTERS = ["qr", "lora_xs", "ohora"]
ROWS = [{"input_ids": row, "labels": row[0] % 3} for row in tokens().repeat(4, 1)]


def _fresh(adapter: str, **options: Any) -> PeftModel:
    """With a head, which is not in the base's file: its start comes from the model."""
    own = config(adapter, task_type="SEQ_CLS", modules_to_save=["classifier"], **options)
    return get_peft_model(bert(), own)


def _trainer(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    return Trainer(model, arguments, train_dataset=ROWS)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}


def _assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        *((adapter, {}) for adapter in ADAPTERS),
        ("qr", {"save_factors": True}),
        ("qr", {"dropout": 0.1}),
    ],
    ids=str,
)
def test_training_resumes_from_a_checkpoint_to_the_bits(
    adapter: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = _fresh(adapter, **options)
    before = _state(model)
    _trainer(model, tmp_path).train()
    after = _state(model)
    assert not any(
        torch.equal(before[n], t)
        for n, t in after.items()
        if t.is_floating_point() and "frozen" not in n
    )
    again = _fresh(adapter, **options)
    _trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    _assert_same(_state(again), after)
    assert torch.equal(predictions(again), predictions(model))
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "checkpoint-4")
    assert torch.equal(predictions(loaded), predictions(model))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_checkpoint_holds_the_adapter_alone(adapter: str, tmp_path: Path) -> None:
    model = _fresh(adapter)
    _trainer(model, tmp_path).train()
    folder = tmp_path / "checkpoint-2"
    assert not list(folder.glob("*model-*")) + list(folder.glob("pytorch_model*"))
    assert not (folder / "model.safetensors").exists()
    kept = sum(t.numel() * t.element_size() for t in _state(model).values())
    base = sum(t.numel() * t.element_size() for t in bert().parameters())
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert kept <= size < kept + 8000  # and the header
    assert size < base / 4


def test_training_goes_on_from_a_model_that_was_loaded_to_train(tmp_path: Path) -> None:
    model = _fresh("qr")
    _trainer(model, tmp_path / "one").train()
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "saved", is_trainable=True)
    one, two = _state(model), _state(loaded)
    _assert_same(one, two)
    _trainer(loaded, tmp_path / "two").train()
    _trainer(model, tmp_path / "three").train()
    _assert_same(_state(loaded), _state(model))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_accelerate_trains_and_saves(adapter: str, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = _fresh(adapter)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    wrapped, optimiser = accelerator.prepare(model, optimiser)
    labels = torch.arange(4) % 3
    losses = []
    for _ in range(3):
        loss = wrapped(input_ids=tokens(), labels=labels).loss
        accelerator.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    accelerator.unwrap_model(wrapped).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(predictions(loaded), predictions(model))
    accelerator.save_state(str(tmp_path / "state"))
    want = _state(model)
    with torch.no_grad():
        for layer in layers(model).values():
            for name in layer.adapter_layer_names:
                getattr(layer, name)["default"].zero_()
    accelerator.load_state(str(tmp_path / "state"))
    _assert_same(_state(model), want)


def test_the_head_is_in_the_file_of_a_base_without_one(tmp_path: Path) -> None:
    """As in practice: a new head over a base from a folder."""
    bert().bert.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    own = config("qr", task_type="SEQ_CLS")
    model = get_peft_model(base, own)
    _trainer(model, tmp_path).train()
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    loaded = PeftModel.from_pretrained(other, tmp_path / "checkpoint-4")
    assert torch.equal(predictions(loaded), predictions(model))
