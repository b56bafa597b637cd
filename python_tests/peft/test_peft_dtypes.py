"""What PEFT casts, and what it must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft_models import bert, config, layers, predictions
from torch import Tensor

ADAPTERS = ["qr", "lora_xs", "ohora"]


def _factors(model: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, layer in layers(model).items()
        for key, tensor in layer.factors("default").items()
    }


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_factors_keep_the_dtypes_of_their_start(adapter: str, autocast: bool) -> None:
    base = bert(dtype=torch.bfloat16)
    model = get_peft_model(base, config(adapter), autocast_adapter_dtype=autocast)
    for name, factor in _factors(model).items():
        wide = name.rsplit(".", 1)[1] in ("pivots", "diagonal", "a0", "b0")
        assert factor.dtype == torch.bfloat16 or wide, name
        assert not wide or factor.dtype in (torch.int64, torch.float32, torch.float64), name
    records = [layer.records["default"] for layer in layers(model).values()]
    assert {record.dtype for record in records} == {torch.int64}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_start_over_half_precision_is_not_rounded(adapter: str) -> None:
    """A = A₀ to the bits, and a draw keeps more than a half's eight bits."""
    options = {"init_std": 0.1} if adapter == "lora_xs" else {}
    model = get_peft_model(bert(dtype=torch.bfloat16), config(adapter, **options))
    for layer in layers(model).values():
        state = layer.factors("default") | layer.trainables("default")
        if adapter == "ohora":
            assert torch.equal(state["a"], state["a0"])
            assert torch.equal(state["b"], state["b0"])
        if adapter == "lora_xs":
            assert not torch.equal(state["core"], state["core"].bfloat16().float())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_further_adapter_leaves_every_flag_as_it_was(adapter: str) -> None:
    model = get_peft_model(bert(), config(adapter, modules_to_save=["classifier"]))
    model.base_model.model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_adapter("second", config(adapter))
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(trains for name, trains in after.items() if name.endswith("second"))
    assert any(before.values())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_cast_of_the_input_may_be_switched_off(adapter: str) -> None:
    model = get_peft_model(bert(), config(adapter))
    want = predictions(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(predictions(model), want)
