"""QR-LoRA under PEFT with factors="output": Q alone is kept, and R̃ made where it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import bert, config, layers, move, predictions
from torch import Tensor

import qrlora_kernels.peft as qkp


def adapted(factors: str = "output", name: str = "default", **options: Any) -> Any:
    model = get_peft_model(bert(), config("qr", factors=factors, **options), name)
    move(model)
    return model.eval()


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_it_is_the_adapter_of_two_factors_up_to_rounding() -> None:
    both, output = adapted("both"), adapted("output")
    close(predictions(output), predictions(both))
    for name, layer in layers(output).items():
        assert layer.factors("default").keys() == {"q", "pivots", "diagonal"}
        other = layers(both)[name]
        close(layer.get_delta_weight("default"), other.get_delta_weight("default"))


@pytest.mark.parametrize("save_factors", [False, True])
def test_a_folder_gives_the_same_model(save_factors: bool, tmp_path: Path) -> None:
    model = adapted(save_factors=save_factors)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert fresh.peft_config["default"].factors == "output"
    assert torch.equal(predictions(fresh), predictions(model))


def test_a_base_that_somebody_listens_to_and_several_adapters() -> None:
    """The update is computed apart there, from R̃ of the weight."""
    both, output = adapted("both"), adapted("output")
    for model in (both, output):
        for layer in layers(model).values():
            layer.base_layer.register_forward_hook(lambda *_: None)
    close(predictions(output), predictions(both))
    for model, factors in ((both, "output"), (output, "both")):
        model.add_adapter("second", config("qr", r=3, factors=factors))
        model.base_model.set_adapter(["default", "second"])
        move(model, seed=3)
    close(predictions(output.eval()), predictions(both.eval()))
    output.delete_adapter("second")
    assert {len(layer.factors_of._modules) for layer in layers(output).values()} == {1}


def test_rows_of_different_adapters_over_one_factor() -> None:
    answers = []
    names = ["default", "second", "__base__", "second"]
    for factors in ("both", "output"):
        model = adapted(factors)
        model.add_adapter("second", config("qr", r=3, factors=factors))
        model.base_model.set_adapter(["default", "second"])
        move(model, seed=3)
        with torch.no_grad():
            ids = torch.arange(20).reshape(4, 5)
            answers.append(model.eval()(input_ids=ids, adapter_names=names).logits)
    close(answers[1], answers[0])


def test_merged_and_taken_apart_bit_for_bit() -> None:
    model = adapted()
    before = predictions(model)
    for _ in range(2):
        model.merge_adapter()
        close(predictions(model), before)
        model.unmerge_adapter()
        assert torch.equal(predictions(model), before)


def test_over_a_weight_that_holds_others_updates_it_is_not_merged() -> None:
    """ΔW would be made of W + the other's update: another than the one that was trained."""
    model = get_peft_model(adapted(), LoraConfig(target_modules=["query", "value"], r=2), "second")
    move(model, seed=4)
    with pytest.raises(ValueError, match=r"query\.weight must be the one that .* 'default' began"):
        model.merge_adapter()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": "input"}, "factors must be one of both, output, got 'input'"),
        ({"factors": "output", "dropout": 0.1}, "dropout must be 0 with factors='output'"),
    ],
)
def test_refused_when_it_is_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qkp.QRLoraConfig(r=4, **options)


def test_half_precision_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match=r"query\.weight must be float32 or float64 with factors"):
        get_peft_model(bert(dtype=torch.bfloat16), config("qr", factors="output"))
