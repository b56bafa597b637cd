"""What the example compares: options, targets, starts of the baselines, warm-up."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from finetuning import adapters, gradients, run, warmup
from finetuning.methods import DEMO, METHODS, OPTIONS
from finetuning.model import load_model
from finetuning.settings import Settings
from finetuning.targets import target_names
from safetensors.torch import load_file
from tiny_encoder import make_settings, write_model
from torch import nn

import qrlora_kernels as qk

LAYERS = {"qr": qk.QRLinear, "lora_xs": qk.LoRAXSLinear, "ohora": qk.OHoRALinear}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def settings(tmp_path, tiny_model) -> Settings:
    return make_settings(tmp_path, tiny_model)


@pytest.mark.parametrize("adapter", LAYERS)
def test_every_option_of_an_adapter_is_an_option_of_the_example(adapter):
    make = LAYERS[adapter].from_linear
    names = set(inspect.signature(make).parameters) - {"linear"}
    assert set(METHODS[adapter].options) == names
    for name, hint in get_type_hints(make).items():
        if name in names and get_origin(hint) is Literal:
            assert OPTIONS[name].choices == get_args(hint)


def test_options_and_methods_know_each_other():
    assert {name for method in METHODS.values() for name in method.options} == set(OPTIONS)
    assert all(set(method.defaults) <= set(method.options) for method in METHODS.values())
    assert set(DEMO) <= set(METHODS)


@pytest.mark.parametrize(
    ("adapter", "options", "expected"),
    [
        ("qr", {"tau": 0.3, "rank_rule": "energy", "scaling": 2.0}, "rank_rule='energy'"),
        ("lora_xs", {"rank": 3, "vectors": "bottom", "sigma": "out"}, "vectors='bottom'"),
        ("ohora", {"rank": 2, "columns": "selected"}, "columns='selected'"),
    ],
)
def test_options_reach_the_layers(settings, adapter, options, expected):
    model = load_model(settings.model, 2, 0)
    adapters.attach(model, replace(settings, adapter=adapter, options=options))
    for layer in qk.adapted_layers(model).values():
        assert expected in repr(layer.options)
        assert all(getattr(layer.options, name) == value for name, value in options.items())


@pytest.mark.parametrize("adapter", ["qr", "lora", "vera"])
@pytest.mark.parametrize(
    ("targets", "layers", "expected"),
    [
        (("query",), "all", 2),
        (("query", "value"), "all", 4),
        ((r".*\.(key|value)",), "all", 4),
        (("all-linear",), "all", 12),
        (("query", "value"), "last:1", 2),
        ((r".*\.(key|value)",), "last:1", 2),
        (("all-linear",), "last:1", 6),
        (("all-linear",), "last:2", 12),
    ],
)
def test_targets_mean_the_same_to_both_libraries(settings, adapter, targets, layers, expected):
    settings = replace(
        settings, adapter=adapter, targets=targets, layers=layers, options={"rank": 1}
    )
    model = adapters.attach(load_model(settings.model, 2, 0), settings)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    own = {_layer_of(n) for n in trained if not n.startswith("head.")}
    encoder = load_model(settings.model, 2, 0).encoder
    assert own == {f"encoder.{n}" for n in target_names(encoder, targets, layers)}
    assert len(own) == expected
    assert layers == "all" or expected == 12 or all(".layer.1." in name for name in own)
    assert {"head.weight", "head.bias"} <= set(trained)


def _layer_of(parameter: str) -> str:
    for mark in (".lora_", ".vera_", ".lam"):
        parameter = parameter.partition(mark)[0]
    return parameter.replace(".base_model.model.", ".")  # PEFT's wrappers


def test_targets_that_are_not_there_are_named(settings):
    encoder = load_model(settings.model, 2, 0).encoder
    with pytest.raises(ValueError, match=r"'query'.*got \['q_proj'\]"):
        target_names(encoder, ("query", "q_proj"), "all")
    with pytest.raises(ValueError, match="at most 'last:2', got 'last:3'"):
        target_names(encoder, ("query",), "last:3")


@pytest.mark.parametrize("adapter", [n for n, m in METHODS.items() if m.provider])
def test_the_model_starts_unchanged(settings, adapter):
    """But for rounding, and for LoRA-XS's core of 1e-5."""
    ids = torch.arange(5, 15).reshape(2, 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    want = load_model(settings.model, 2, 0)(**inputs)
    model = adapters.attach(
        load_model(settings.model, 2, 0), replace(settings, adapter=adapter, options={"rank": 4})
    )
    torch.testing.assert_close(model(**inputs), want, rtol=1e-5, atol=1e-5)


def test_a_gradient_basis_takes_the_gradient_of_the_first_rows(settings):
    options = {"rank": 3, "basis": "gradient"}
    result = run.fine_tune(replace(settings, adapter="lora_xs", options=options))
    assert (result["trained"], result["reload_difference"]) == (4 * 3**2, 0.0)
    data = run.read_tsv(settings.train_file, settings.eval_file)
    train_set, _ = run.encoded(data, settings)
    model = run.fresh_model(data, settings)
    gradients.accumulate(model.encoder, model, train_set, settings)
    assert not any(p.requires_grad for p in model.encoder.parameters())
    with_one = {n for n, p in model.encoder.named_parameters() if p.grad is not None}
    names = target_names(model.encoder, settings.targets, settings.layers)
    assert with_one == {f"{name}.weight" for name in names}


def test_svd_lora_starts_from_the_first_singular_directions(settings):
    weight = load_model(settings.model, 2, 0).encoder.encoder.layer[0].attention.self.query.weight
    u, s, vt = torch.linalg.svd(weight.detach())
    options = {"rank": 3, "directions": 2, "alpha": 6.0}
    model = load_model(settings.model, 2, 0)
    adapters.attach(model, replace(settings, adapter="svd_lora", options=options))
    layer = model.encoder.get_base_model().encoder.layer[0].attention.self.query
    update = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(update, u[:, :2] * s[:2] @ vt[:2], rtol=1e-4, atol=1e-5)
    assert layer.lora_B["default"].weight[:, 2].abs().max() == 0.0
    assert layer.lora_A["default"].weight[2].abs().max() > 0.0
    with pytest.raises(ValueError, match=r"directions must be in 1 .. rank = 2, got 3"):
        adapters.attach(
            load_model(settings.model, 2, 0),
            replace(settings, adapter="svd_lora", options={"directions": 3}),
        )


def test_a_warmed_up_model_is_trained_once_and_is_the_base_of_all(settings, tmp_path, monkeypatch):
    folder = tmp_path / "warmed"
    settings = replace(settings, warmup_epochs=1, warmup_folder=folder)
    trained: list[str] = []
    train = warmup._train
    monkeypatch.setattr(
        warmup, "_train", lambda *args: (trained.append(args[2].adapter), train(*args))
    )
    for adapter in ("qr", "lora", "none"):
        result = run.fine_tune(replace(settings, adapter=adapter, out=tmp_path / adapter))
        assert result["reload_difference"] == 0.0
        assert len(result["losses"]) == 2 * 7
    assert trained == ["qr"]
    data = run.read_tsv(settings.train_file, settings.eval_file)
    train_set, _ = run.encoded(data, settings)
    warmed = run.base_model(data, train_set, settings)
    (path,) = folder.iterdir()
    fresh = run.fresh_model(data, settings)
    assert _moved(warmed, fresh) == {n for n, _ in fresh.named_parameters()}
    assert not any(p.requires_grad for p in warmed.encoder.parameters())
    assert all(torch.equal(load_file(path)[n], t) for n, t in warmed.state_dict().items())
    warmup.warm_up(fresh, train_set, replace(settings, seed=1))
    assert trained == ["qr", "qr"]
    assert len(list(folder.iterdir())) == 2


def _moved(model: nn.Module, other: nn.Module) -> set[str]:
    """Names of the parameters that differ."""
    before = dict(other.named_parameters())
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def test_full_fine_tuning_moves_every_weight_and_head_only_none(settings):
    for adapter in ("full", "none"):
        model = adapters.attach(
            load_model(settings.model, 2, 0), replace(settings, adapter=adapter)
        )
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        every = {n for n, _ in model.named_parameters()}
        assert trained == (every if adapter == "full" else {"head.weight", "head.bias"})
