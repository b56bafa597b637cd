"""Files of the PEFT methods: the bits of what was saved, by every way of loading."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft_models import CONFIGS, DTYPES, TARGETS, adapted, bert, config, predictions
from peft_models import gpt2, layers, llama, refusal, saved
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from qrlora_kernels import adapters

pytestmark = pytest.mark.filterwarnings("error:Found missing adapter keys")


def _from_pretrained(base: Path, folder: Path, **options: Any) -> nn.Module:
    return PeftModel.from_pretrained(_base(base), folder, **options)


def _base(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder)


def _as_second(base: Path, folder: Path) -> nn.Module:
    """Beside one that targets fewer layers, with a start of its own."""
    kind = type(PeftConfig.from_pretrained(folder))
    model = get_peft_model(_base(base), kind(target_modules=["query"], r=2, task_type="SEQ_CLS"))
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model


def _by_transformers(base: Path, folder: Path) -> nn.Module:
    model = _base(base)
    model.load_adapter(str(folder))
    return model


def _injected(base: Path, folder: Path, **options: Any) -> nn.Module:
    model = inject_adapter_in_model(PeftConfig.from_pretrained(folder), _base(base), **options)
    set_peft_model_state_dict(model, load_peft_weights(folder), **options)
    return model


def _into_a_fresh_one(base: Path, folder: Path) -> nn.Module:
    own = PeftConfig.from_pretrained(folder)
    own.file_format = None
    for name, parameter in (model := _base(base)).named_parameters():
        if name.endswith(("query.weight", "value.weight")):
            parameter.grad = torch.eye(32, dtype=parameter.dtype)  # another basis, for who wants one
    model = get_peft_model(model, own)
    set_peft_model_state_dict(model, load_peft_weights(folder))
    return model


WAYS: dict[str, Callable[[Path, Path], nn.Module]] = {
    "PeftModel.from_pretrained": _from_pretrained,
    "low_cpu_mem_usage": lambda b, f: _from_pretrained(b, f, low_cpu_mem_usage=True),
    "is_trainable": lambda b, f: _from_pretrained(b, f, is_trainable=True),
    "load_adapter of a second": _as_second,
    "AutoPeftModel": lambda b, f: AutoPeftModelForSequenceClassification.from_pretrained(f),
    "transformers' load_adapter": _by_transformers,
    "AutoModel": lambda b, f: AutoModelForSequenceClassification.from_pretrained(f),
    "inject_adapter_in_model": _injected,
    "inject, low_cpu_mem_usage": lambda b, f: _injected(b, f, low_cpu_mem_usage=True),
    "set_peft_model_state_dict": _into_a_fresh_one,
}


class Saved:
    def __init__(self, folder: Path, adapter: str, dtype: torch.dtype, **options: Any) -> None:
        self.base, self.folder = folder / "base", folder / "adapter"
        bert(dtype=dtype).save_pretrained(self.base)
        base = _base(self.base)
        if options.get("basis") == "gradient":
            generator = torch.Generator().manual_seed(3)
            for parameter in base.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        model = adapted(adapter, base, task_type="SEQ_CLS", **options)
        model.save_pretrained(self.folder)
        self.predictions = predictions(model)
        assert not torch.equal(self.predictions, predictions(_base(self.base)))


FILES = [(adapter, {}) for adapter in CONFIGS]
FILES += [(adapter, {"save_factors": True}) for adapter in CONFIGS]
FILES += [("lora_xs", {"basis": "gradient"})]


@pytest.fixture(scope="module", params=DTYPES, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=FILES, ids=lambda file: "-".join(map(str, [file[0], *file[1]])))
def written(
    request: pytest.FixtureRequest, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> Saved:
    adapter, options = request.param
    return Saved(tmp_path_factory.mktemp("saved"), adapter, dtype, **options)


@pytest.mark.parametrize("way", WAYS)
def test_loaded_model_predicts_the_bits_of_the_saved_one(way: str, written: Saved) -> None:
    assert torch.equal(predictions(WAYS[way](written.base, written.folder)), written.predictions)


def test_a_loaded_adapter_is_saved_as_it_was(written: Saved, tmp_path: Path) -> None:
    """After transformers wrote into it too."""
    model = _from_pretrained(written.base, written.folder)
    model.save_pretrained(tmp_path / "peft")
    injected = _by_transformers(written.base, written.folder)
    predictions(injected)  # takes up what was loaded
    again = get_state(injected)
    before = load_file(written.folder / "adapter_model.safetensors")
    after = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
        short = name.removeprefix("base_model.model.")
        if "classifier" not in name:
            assert torch.equal(again[short], tensor), name
