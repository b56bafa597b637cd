"""Models that are copied, offloaded or merged, and files with more than one adapter's layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft_models import adapted, bert, config, layers, move, predictions, saved

ADAPTERS = ["qr", "lora_xs", "ohora"]
each_file = pytest.mark.parametrize("save_factors", [False, True], ids=["", "factors"])
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS)


@each_adapter
def test_a_loaded_model_is_copied_and_pickled(adapter: str, tmp_path: Path) -> None:
    want = saved(tmp_path, adapter)
    model = PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(predictions(copy.deepcopy(model)), want)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(predictions(torch.load(tmp_path / "model.pt", weights_only=False)), want)


@each_adapter
def test_an_offloaded_base_starts_trains_and_is_saved(adapter: str, tmp_path: Path) -> None:
    base = bert()
    accelerate.cpu_offload(base)
    model = adapted(adapter, base)
    want = predictions(adapted(adapter))
    torch.testing.assert_close(predictions(model), want)
    model.train()(input_ids=torch.ones(1, 3).long()).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(predictions(loaded), want)


@each_file
@each_adapter
def test_a_file_is_loaded_over_an_offloaded_base(
    adapter: str, save_factors: bool, tmp_path: Path
) -> None:
    want = saved(tmp_path, adapter, save_factors=save_factors)
    base = bert()
    accelerate.cpu_offload(base)
    torch.testing.assert_close(predictions(PeftModel.from_pretrained(base, tmp_path)), want)
    other = bert(seed=1)
    accelerate.cpu_offload(other)
    with pytest.raises(ValueError, match="trained over another base weight in bert"):
        PeftModel.from_pretrained(other, tmp_path)


@each_file
@each_adapter
def test_injected_by_the_names_in_a_file(adapter: str, save_factors: bool, tmp_path: Path) -> None:
    """In place of target_modules, which may be lost."""
    want = saved(tmp_path, adapter, save_factors=save_factors)
    weights = load_peft_weights(str(tmp_path))
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    own = config(adapter, target_modules=["classifier"])
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        model = inject_adapter_in_model(own, bert(), state_dict=state)
    set_peft_model_state_dict(model, state)
    assert torch.equal(predictions(model), want)


@each_file
@each_adapter
def test_loaded_while_another_is_merged(adapter: str, save_factors: bool, tmp_path: Path) -> None:
    want = saved(tmp_path, adapter, save_factors=save_factors)
    model = adapted(adapter)
    move(model, seed=7)
    model.merge_adapter()
    model.load_adapter(tmp_path, "second")
    model.unmerge_adapter()
    model.set_adapter("second")
    assert torch.equal(predictions(model), want)


@each_adapter
def test_a_merged_model_is_saved_as_it_was_before(adapter: str, tmp_path: Path) -> None:
    model = adapted(adapter)
    want = predictions(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(predictions(PeftModel.from_pretrained(bert(), tmp_path)), want)


@each_file
@each_adapter
def test_several_adapters_are_saved_together(
    adapter: str, save_factors: bool, tmp_path: Path
) -> None:
    """Of one start and of others, each in a folder with what is its own."""
    model = adapted(adapter, save_factors=save_factors)
    model.add_adapter("same", config(adapter, save_factors=save_factors))
    model.add_adapter("smaller", config(adapter, r=2, save_factors=save_factors))
    want = {}
    for seed, name in enumerate(("default", "same", "smaller")):
        model.set_adapter(name)
        move(model, seed)
        want[name] = predictions(model)
    model.save_pretrained(tmp_path)
    for name, tensor in want.items():
        folder = tmp_path if name == "default" else tmp_path / name
        assert torch.equal(predictions(PeftModel.from_pretrained(bert(), folder)), tensor)
    together = PeftModel.from_pretrained(bert(), tmp_path)
    for name in ("smaller", "same"):
        together.load_adapter(tmp_path / name, name)
    for name, tensor in want.items():
        together.set_adapter(name)
        assert torch.equal(predictions(together), tensor)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"bias": "qk_only"},
        {"trainable_token_indices": {"word_embeddings": [3, 5]}},
        {"modules_to_save": ["classifier", "pooler"]},
        {"rank_pattern": {"layer.0.*query": 2}, "alpha_pattern": {"value": 3.0}},
        {"layers_to_transform": [1], "layers_pattern": "layer"},
        {"exclude_modules": ["value"], "target_modules": "all-linear"},
        {"target_modules": r".*\.1\.attention.*(query|dense)"},
    ],
    ids=str,
)
@each_adapter
def test_every_option_survives_its_file(
    adapter: str, options: dict[str, Any], tmp_path: Path
) -> None:
    if adapter == "ohora" and "rank_pattern" in options:
        options = {"rank_pattern": {"layer.0.*query": 2}}
    if adapter == "ohora" and options.get("target_modules") == "all-linear":
        options = options | {"exclude_modules": ["value", "pooler.dense", "classifier"]}
    want = saved(tmp_path, adapter, **options)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(predictions(loaded), want)
    again = get_peft_model(bert(), config(adapter, **options))
    assert layers(loaded).keys() == layers(again).keys()


@each_adapter
def test_the_default_device_concerns_no_tensor_of_ours(adapter: str, tmp_path: Path) -> None:
    """A default of "cuda" over a base elsewhere; here meta, whose numbers cannot be read at all."""
    bases = bert(), bert()
    with torch.device("meta"):
        model = get_peft_model(bases[0], config(adapter))
    move(model)
    want = predictions(model)
    with torch.device("meta"):
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(bases[1], tmp_path)
    assert torch.equal(predictions(loaded), want)
    assert torch.equal(predictions(adapted(adapter)), want)
