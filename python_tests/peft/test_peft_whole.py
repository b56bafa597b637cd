"""State dicts of a whole model: base, trained numbers and records, written in one go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import convert_to_lora, get_peft_model
from peft_models import adapted, bert, config, layers, predictions, refusal, saved
from torch import nn

ADAPTERS = ["qr", "lora_xs", "ohora"]
OTHER = "the adapter was trained over another base weight in bert.encoder.layer.0.attention.self"


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_model_over_other_numbers_becomes_the_saved_one(adapter: str, assign: bool) -> None:
    """The base's weights come along, and the factors are then of those."""
    model = adapted(adapter)
    other = get_peft_model(bert(seed=1), config(adapter))
    other.load_state_dict(model.state_dict(), assign=assign)
    drawn = torch.random.get_rng_state()
    assert torch.equal(predictions(other), predictions(model))
    assert torch.equal(torch.random.get_rng_state(), drawn)  # starting again draws nothing


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("save_factors", [False, True], ids=["", "factors"])
def test_a_base_that_is_replaced_after_the_start_takes_its_adapter(
    adapter: str, save_factors: bool, tmp_path: Path
) -> None:
    want = saved(tmp_path, adapter, save_factors=save_factors)
    model = get_peft_model(bert(seed=1), config(adapter))
    whole = get_peft_model(bert(), config(adapter)).state_dict()
    model.load_state_dict({k: v for k, v in whole.items() if ".qk" not in k}, strict=False)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(predictions(model), want)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_without_its_base_is_refused_until_it_has_it(adapter: str) -> None:
    model = adapted(adapter)
    other = get_peft_model(bert(seed=1), config(adapter))
    whole = model.state_dict()
    other.load_state_dict({k: v for k, v in whole.items() if ".qk" in k}, strict=False)
    assert OTHER in refusal(lambda: predictions(other))
    assert OTHER in refusal(lambda: predictions(other))
    other.load_state_dict(whole)
    assert torch.equal(predictions(other), predictions(model))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_expected_does_not_follow_what_is_loaded(adapter: str) -> None:
    for layer in layers(adapted(adapter)).values():
        assert layer.records["default"].data_ptr() != layer.expected["default"].data_ptr()


def _updates(model: nn.Module) -> list[torch.Tensor]:
    return [layer.get_delta_weight("default") for layer in layers(model).values()]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("save_factors", [False, True], ids=["", "factors"])
def test_an_update_is_compared_before_it_is_handed_out(
    adapter: str, save_factors: bool, tmp_path: Path
) -> None:
    """After transformers' loading no forward need come first, such as in PEFT's conversion."""
    want = _updates(adapted(adapter))
    saved(tmp_path, adapter, save_factors=save_factors)
    base, wrong = bert(), bert(seed=1)
    for model in (base, wrong):
        model.load_adapter(str(tmp_path))
    assert all(map(torch.equal, _updates(base), want))
    assert OTHER in refusal(lambda: _updates(wrong))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_pefts_conversion_to_lora_takes_the_update(adapter: str) -> None:
    model = adapted(adapter)
    _, factors = convert_to_lora(model, 32)
    for name, layer in layers(model).items():
        down, up = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(up @ down, layer.get_delta_weight("default"))
