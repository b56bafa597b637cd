"""Weighted sums of adapters: exact over shared factors, refused otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_models import bert, config, layers, move, predictions


def three(adapter: str, **second: Any) -> Any:
    model = get_peft_model(bert(), config(adapter), adapter_name="a")
    model.add_adapter("b", config(adapter, **second))
    model.base_model.set_adapter(["a", "b"])
    move(model)
    model.set_adapter("a")
    return model


@pytest.mark.parametrize(
    ("adapter", "second"),
    [
        ("qr", {}),
        ("qr", {"r": 2, "alpha": 3.0}),
        ("qr", {"r": 6}),
        ("qr_tau", {"target_modules": ["query"]}),
        ("lora_xs", {}),
        ("lora_xs", {"alpha": 2.0}),
    ],
    ids=str,
)
def test_the_update_is_the_weighted_sum(
    adapter: str, second: dict[str, Any], tmp_path: Path
) -> None:
    model = three(adapter, **second)
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, -0.2], "mix")
    for layer in layers(model).values():
        want = 0.7 * layer.get_delta_weight("a")
        if layer.has("b"):
            want = want - 0.2 * layer.get_delta_weight("b")
        torch.testing.assert_close(layer.get_delta_weight("mix"), want, rtol=1e-5, atol=1e-6)
        assert len(layer.factors_of._modules) == 1
    model.set_adapter("mix")
    want = predictions(model)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    again = PeftModel.from_pretrained(bert(), tmp_path / "mix")
    assert torch.equal(predictions(again), want)


@pytest.mark.parametrize(
    ("adapter", "second", "arguments", "says"),
    [
        ("ohora", {}, (["a", "b"], [1.0, 1.0]), "a sum of Kronecker products is none"),
        ("lora_xs", {"vectors": "bottom"}, (["a", "b"], [1.0, 1.0]), "begin from the same factors"),
        ("qr", {}, (["a", "c"], [1.0, 1.0]), "Adapter c does not exist"),
        ("qr", {}, (["a", "b"], [1.0]), "must be as many"),
        ("qr", {}, ([], []), "one at least"),
        ("qr", {}, (["a"], [float("nan")]), "weights must be finite"),
    ],
    ids=str,
)
def test_refused_in_a_sentence(
    adapter: str, second: dict[str, Any], arguments: Any, says: str
) -> None:
    model = three(adapter, **second)
    with pytest.raises(ValueError, match=says):
        model.base_model.add_weighted_adapter(*arguments, "mix")
    assert "mix" not in model.peft_config


def test_only_the_linear_combination_is_offered() -> None:
    model = three("qr")
    with pytest.raises(ValueError, match="combination_type must be 'linear'"):
        model.base_model.add_weighted_adapter(["a"], [1.0], "mix", combination_type="svd")
