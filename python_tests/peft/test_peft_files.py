"""Files of the PEFT methods: the bits of what was saved, by every way of loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft_models import (
    CONFIGS,
    adapted,
    bert,
    predictions,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

pytestmark = pytest.mark.filterwarnings("error:Found missing adapter keys")


class Saved:
    """A base and an adapter on disk, and what the two predict."""

    def __init__(self, folder: Path, adapter: str, dtype: torch.dtype, **options: Any) -> None:
        self.dtype, self.folder = dtype, folder / "adapter"
        base = bert(dtype=dtype)
        base.save_pretrained(folder / "base")
        base.name_or_path = base.config.name_or_path = str(folder / "base")
        if options.get("basis") == "gradient":
            generator = torch.Generator().manual_seed(3)
            for parameter in base.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        model = adapted(adapter, base, task_type="SEQ_CLS", **options)
        model.save_pretrained(self.folder)
        self.predictions = predictions(model)
        assert not torch.equal(self.predictions, predictions(self.base()))

    def base(self) -> Any:
        return bert(dtype=self.dtype)

    def config(self) -> Any:
        return PeftConfig.from_pretrained(self.folder)


def _from_pretrained(saved: Saved, **options: Any) -> nn.Module:
    return PeftModel.from_pretrained(saved.base(), saved.folder, **options)


def _as_second(saved: Saved) -> nn.Module:
    """Beside one that targets fewer layers, with a start of its own."""
    first = type(saved.config())(target_modules=["query"], r=2, task_type="SEQ_CLS")
    model = get_peft_model(saved.base(), first)
    model.load_adapter(saved.folder, "second")
    model.set_adapter("second")
    return model


def _by_transformers(saved: Saved) -> nn.Module:
    model = saved.base()
    model.load_adapter(str(saved.folder))
    return model


def _injected(saved: Saved, **options: Any) -> nn.Module:
    model = inject_adapter_in_model(saved.config(), saved.base(), **options)
    # Without its prefix: PEFT itself finds no modules_to_save of an injected model under it.
    weights = load_peft_weights(saved.folder)
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    set_peft_model_state_dict(model, state, **options)
    return model


def _into_a_fresh_one(saved: Saved) -> nn.Module:
    own, base = saved.config(), saved.base()
    own.file_format = None
    for name, parameter in base.named_parameters():
        if name.endswith(("query.weight", "value.weight")):
            parameter.grad = torch.eye(
                32, dtype=parameter.dtype
            )  # another basis, for who wants one
    model = get_peft_model(base, own)
    set_peft_model_state_dict(model, load_peft_weights(saved.folder))
    return model


WAYS: dict[str, Callable[[Saved], nn.Module]] = {
    "PeftModel.from_pretrained": _from_pretrained,
    "low_cpu_mem_usage": lambda saved: _from_pretrained(saved, low_cpu_mem_usage=True),
    "is_trainable": lambda saved: _from_pretrained(saved, is_trainable=True),
    "load_adapter of a second": _as_second,
    "AutoPeftModel": lambda saved: AutoPeftModelForSequenceClassification.from_pretrained(
        saved.folder
    ),
    "transformers' load_adapter": _by_transformers,
    "AutoModel": lambda saved: AutoModelForSequenceClassification.from_pretrained(saved.folder),
    "inject_adapter_in_model": _injected,
    "inject, low_cpu_mem_usage": lambda saved: _injected(saved, low_cpu_mem_usage=True),
    "set_peft_model_state_dict": _into_a_fresh_one,
}
FILES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    **{f"{adapter}-fp32": (adapter, torch.float32, {}) for adapter in CONFIGS},
    **{f"{adapter}-bf16": (adapter, torch.bfloat16, {}) for adapter in CONFIGS},
    **{
        f"{adapter}-factors": (adapter, torch.bfloat16, {"save_factors": True})
        for adapter in CONFIGS
    },
    "gradient": ("lora_xs", torch.float32, {"basis": "gradient"}),
}


@pytest.fixture(scope="module", params=FILES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    adapter, dtype, options = FILES[request.param]
    return Saved(tmp_path_factory.mktemp("saved"), adapter, dtype, **options)


@pytest.mark.parametrize("way", WAYS)
def test_loaded_model_predicts_the_bits_of_the_saved_one(way: str, written: Saved) -> None:
    assert torch.equal(predictions(WAYS[way](written)), written.predictions)


def test_a_loaded_adapter_is_saved_as_it_was(written: Saved, tmp_path: Path) -> None:
    """After transformers wrote into it too."""
    model = _from_pretrained(written)
    model.save_pretrained(tmp_path / "peft")
    injected = _by_transformers(written)
    predictions(injected)  # takes up what was loaded
    again = get_peft_model_state_dict(injected)
    before = load_file(written.folder / "adapter_model.safetensors")
    after = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
        short = name.removeprefix("base_model.model.")
        if "classifier" not in name:
            assert torch.equal(again[short], tensor), name
