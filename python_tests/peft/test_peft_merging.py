"""Merging under PEFT: the original comes back to the bits, whatever was merged in between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import CONFIGS, adapted, bert, config, gpt2, layers, move, predictions
from torch import nn

from qrlora_kernels.nn.rounding import round_unbiased

ADAPTERS = ["qr", "lora_xs", "ohora"]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: layer.base_layer.weight.detach().clone() for n, layer in layers(model).items()}


@pytest.mark.parametrize("adapter", CONFIGS)
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(adapter: str, safe: bool) -> None:
    model = adapted(adapter)
    before, held = predictions(model), weights(model)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(predictions(model), before, rtol=1e-4, atol=1e-5)
    assert not any(torch.equal(held[n], w) for n, w in weights(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(held[n], w) for n, w in weights(model).items())
    assert torch.equal(predictions(model), before)


@pytest.mark.parametrize("adapter", CONFIGS)
def test_one_after_the_other_and_all_back(adapter: str) -> None:
    model = adapted(adapter)
    model.add_adapter("other", config(adapter))
    model.base_model.set_adapter(["default", "other"])
    move(model, seed=3)
    before, held = predictions(model), weights(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    torch.testing.assert_close(predictions(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(held[n], w) for n, w in weights(model).items())


@pytest.mark.parametrize("adapter", CONFIGS)
def test_what_is_added_while_another_is_merged_starts_from_the_original(adapter: str) -> None:
    model = adapted(adapter)
    model.merge_adapter()
    model.add_adapter("other", config(adapter))
    for layer in layers(model).values():
        assert len(layer.factors_of._modules) == 1
    model.unmerge_adapter()


def test_safe_merge_refuses_before_anything_changes() -> None:
    model = adapted("qr")
    model.add_adapter("other", config("qr"))
    last = list(layers(model).values())[-1]
    with torch.no_grad():
        last.qkdiag_lam["other"] += float("nan")
    held = weights(model)[next(n for n, m in layers(model).items() if m is last)]
    with pytest.raises(ValueError, match="NaNs detected"):
        last.merge(safe_merge=True, adapter_names=["default", "other"])
    assert torch.equal(last.base_layer.weight, held)
    assert not last.merged


def test_half_precision_is_rounded_once_and_without_bias() -> None:
    """To-nearest would drop an update that is small against W."""
    model = adapted("qr", bert(dtype=torch.bfloat16), alpha=0.1)
    model.add_adapter("other", config("qr", alpha=0.1))
    want = {}
    for name, layer in layers(model).items():
        with torch.no_grad():
            layer.qkdiag_lam["other"] += 0.5
        exact = layer.base_layer.weight.float()
        exact = exact + layer.get_delta_weight("default") + layer.get_delta_weight("other")
        want[name] = round_unbiased(exact, torch.bfloat16)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    got = weights(model)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2**-7, atol=1e-6)
        assert (got[name] == want[name]).float().mean() > 0.99


@pytest.mark.parametrize("adapter", CONFIGS)
def test_merge_and_unload_is_a_plain_model(adapter: str) -> None:
    model = adapted(adapter)
    before = predictions(model)
    plain = model.merge_and_unload()
    assert not layers(plain)
    torch.testing.assert_close(predictions(plain), before, rtol=1e-4, atol=1e-5)


def test_conv1d_merges_as_it_stores_its_weight() -> None:
    model = get_peft_model(gpt2(), config("qr", target_modules=["c_attn"]))
    move(model)
    before = predictions(model)
    model.merge_adapter()
    torch.testing.assert_close(predictions(model), before, rtol=1e-4, atol=1e-4)


def test_a_merged_model_follows_a_cast_and_comes_back_in_it() -> None:
    model = adapted("qr")
    held = weights(model)
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    for name, weight in weights(model).items():
        assert torch.equal(weight, held[name].double())


def test_disabling_a_merged_model_unmerges_it() -> None:
    model = adapted("qr")
    plain = predictions(bert())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(predictions(model), plain)


class Tied(nn.Module):
    """Two layers over one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_layers_over_one_weight_are_not_merged(adapter: str) -> None:
    """Each would get the other's update, and what is put back last would hold the first's."""
    model = get_peft_model(Tied(), config(adapter, target_modules=["one", "two"])).eval()
    move(model)
    before = model(torch.ones(2, 32))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="got one that one and two share"):
            merge()
    assert torch.equal(model(torch.ones(2, 32)), before)
    alone = get_peft_model(Tied(), config(adapter, target_modules=["one"]))
    alone.merge_adapter()


# Of one kind they stand beside each other in one layer.
AROUND = [(one, other) for one in ADAPTERS for other in ("lora", *ADAPTERS) if one != other]


@pytest.mark.parametrize(("adapter", "outer"), AROUND)
def test_adapters_around_adapters_are_merged_and_unmerged(adapter: str, outer: str) -> None:
    """PEFT takes out the outer ones first, whose updates the inner ones must not put back."""
    lora = LoraConfig(target_modules=["query", "value"], r=2)
    model = get_peft_model(adapted(adapter), lora if outer == "lora" else config(outer), "second")
    move(model, seed=4)
    before = predictions(model)
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close(predictions(model), before, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(predictions(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_others_do_to_a_merged_weight_stays(adapter: str) -> None:
    model = adapted(adapter)
    model.add_adapter("other", config(adapter))
    model.base_model.set_adapter(["default", "other"])
    move(model, seed=3)
    layer, held = next(iter(layers(model).values())), weights(model)
    first = next(iter(held.values()))
    model.merge_adapter(["default"])
    layer.base_layer.weight.data += 1.0
    model.merge_adapter(["other"])
    both = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(layer.weight.detach(), first + 1.0 + both, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.weight.detach(), first + 1.0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_original_that_is_loaded_into_a_merged_model_is_not_reduced(adapter: str) -> None:
    model = adapted(adapter)
    before, whole = predictions(model), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    model.load_state_dict(whole)
    model.unmerge_adapter()
    assert torch.equal(predictions(model), before)
