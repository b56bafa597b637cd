"""A layer under PEFT: what it computes, with one adapter, several, none, and over any base."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import CONFIGS, bert, config, layers, move, predictions
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qrlora_kernels as qk


class Net(nn.Module):
    """Two layers, one as GPT-2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(24, 36)
        self.two = Conv1D(16, 36)
        self.two.weight.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(torch.relu(self.one(x)))
        return y


def net(dtype: torch.dtype = torch.float32, **options: Any) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def tuned(adapter: str, base: nn.Module, **options: Any) -> Any:
    model = get_peft_model(base, config(adapter, **{"target_modules": ["one", "two"]} | options))
    move(model)
    return model


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def by_hand(model: Any, x: Tensor, names: list[str]) -> Tensor:
    """Every layer with W + Σ ΔW, in fp64."""
    plain = copy.deepcopy(model.get_base_model()).double()
    for name in ("one", "two"):
        layer = getattr(model.get_base_model(), name)
        total = sum(layer.get_delta_weight(n).double() for n in names if layer.has(n))
        base = getattr(plain, name).base_layer
        base.weight.data += total
        setattr(plain, name, base)
    y: Tensor = plain(x.double())
    return y


@pytest.mark.parametrize("adapter", CONFIGS)
def test_begins_as_its_base_and_then_is_w_plus_delta(adapter: str) -> None:
    base = net()
    before = base(tokens())
    model = get_peft_model(base, config(adapter, target_modules=["one", "two"]))
    torch.testing.assert_close(model(tokens()), before, rtol=1e-5, atol=1e-5)
    move(model)
    assert (model(tokens()) - before).abs().max() > 1e-2
    torch.testing.assert_close(
        model(tokens()).double(), by_hand(model, tokens(), ["default"]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("adapter", CONFIGS)
def test_several_active_adapters_add_up(adapter: str) -> None:
    model = tuned(adapter, net())
    model.add_adapter("other", config(adapter, target_modules=["two"]))
    model.base_model.set_adapter(["default", "other"])
    move(model, seed=2)
    torch.testing.assert_close(
        model(tokens()).double(),
        by_hand(model, tokens(), ["default", "other"]),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("adapter", CONFIGS)
def test_a_base_that_somebody_listens_to_answers_for_itself(adapter: str) -> None:
    model = tuned(adapter, net())
    fused = model(tokens())
    heard: list[Tensor] = []
    base = model.get_base_model().one.base_layer
    handle = base.register_forward_hook(lambda module, args, y: heard.append(y))
    apart = model(tokens())
    assert len(heard) == 1
    torch.testing.assert_close(apart, fused, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert torch.equal(model(tokens()), fused)


@pytest.mark.parametrize("adapter", CONFIGS)
def test_bf16_keeps_small_updates_of_the_trained_numbers(adapter: str) -> None:
    """PEFT casts what it takes for an adapter's to the base's dtype and up again."""
    model = get_peft_model(net(torch.bfloat16), config(adapter, target_modules=["one"]))
    layer = model.get_base_model().one
    for name in layer.adapter_layer_names:
        trained = getattr(layer, name)["default"]
        assert trained.dtype == torch.float32
        trained.data += 1 + 2**-20
        assert not torch.equal(trained.data.bfloat16().float(), trained.data)
    assert model(tokens(torch.bfloat16)).dtype == torch.bfloat16
    wide = {torch.float32} if adapter == "ohora" else {torch.bfloat16}
    operands = layer.tensors("default").keys() - set(layer.adapter.trainables)
    assert {layer.factors("default")[key].dtype for key in operands} == wide


@pytest.mark.parametrize("adapter", CONFIGS)
def test_without_autocast_of_adapters_they_have_the_bases_dtype_and_begin_as_it(
    adapter: str,
) -> None:
    base = net(torch.bfloat16)
    before = base(tokens(torch.bfloat16))
    cfg = config(adapter, target_modules=["one", "two"])
    model = get_peft_model(base, cfg, autocast_adapter_dtype=False)
    trains = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trains} == {torch.bfloat16}
    torch.testing.assert_close(model(tokens(torch.bfloat16)), before, rtol=2e-2, atol=2e-2)
    model(tokens(torch.bfloat16)).float().square().mean().backward()
    assert all(p.grad is not None for p in trains)


@pytest.mark.parametrize("adapter", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_takes_everything_along(adapter: str, dtype: torch.dtype) -> None:
    model = tuned(adapter, net())
    want = model(tokens())
    slack = 1e-5 if dtype == torch.float64 else 0.1
    got = model.to(dtype)(tokens(dtype))
    torch.testing.assert_close(got.float(), want, rtol=slack, atol=slack)


@pytest.mark.parametrize("adapter", CONFIGS)
def test_dropout_concerns_training_and_the_update_alone(adapter: str) -> None:
    model = tuned(adapter, net(), dropout=0.5, target_modules=["one"])
    assert not torch.equal(model.train()(tokens()), model(tokens()))
    assert torch.equal(model.eval()(tokens()), model(tokens()))
    with model.disable_adapter():
        assert torch.equal(model.train()(tokens()), model(tokens()))


@pytest.mark.parametrize("adapter", CONFIGS)
def test_a_frozen_model_computes_the_bits_of_the_one_that_trains(adapter: str) -> None:
    """``torch.matmul`` takes another way for what asks for a gradient."""
    model = tuned(adapter, net())
    with torch.no_grad():
        want = model(tokens())
    trained = model(tokens())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(model(tokens()), want)
    assert torch.equal(trained, want)


def test_scaling_is_alpha_over_the_layers_rank() -> None:
    model = tuned("qr_tau", net(), alpha=8.0, alpha_pattern={"two": 2.0})
    for name, layer in layers(model).items():
        alpha = 2.0 if name == "two" else 8.0
        assert layer.scaling["default"] == alpha / layer.r["default"]


def test_ranks_follow_r_and_its_pattern() -> None:
    model = tuned("qr", net(), r=6, rank_pattern={"two": 3})
    assert {name: layer.r["default"] for name, layer in layers(model).items()} == {
        "one": 6,
        "two": 3,
    }


def test_a_rank_that_a_layer_is_too_small_for_is_bounded_with_a_word() -> None:
    with pytest.warns(UserWarning, match=r"r is bounded .* two \(16\)"):
        model = tuned("lora_xs", net(), r=20)
    assert {layer.r["default"] for layer in layers(model).values()} == {20, 16}


def test_the_layer_repeats_what_adapt_computes() -> None:
    """The same start and the same update as the modules of the package."""
    ours = qk.adapt(net(), ["one"], "qr", tau=0.6)
    peft = get_peft_model(net(), config("qr_tau", target_modules=["one"]))
    layer = peft.get_base_model().one
    assert torch.equal(layer.factors("default")["q"], ours.one.q)
    with torch.no_grad():
        ours.one.lam += 0.3
        layer.qkdiag_lam["default"] += 0.3
    assert torch.equal(peft(tokens()), ours(tokens()))


def test_what_cannot_be_adapted_is_refused_by_name_and_nothing_changes() -> None:
    model = bert()
    before = str(model)
    with pytest.raises(TypeError, match=r"bert\.embeddings\.LayerNorm.* is not supported"):
        get_peft_model(model, config("qr", target_modules=["query", "embeddings.LayerNorm"]))
    assert str(model) == before


def test_a_layer_that_its_parent_never_calls_is_refused_by_name() -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(16, 2)})
    with pytest.raises(ValueError, match=r"mha\.out_proj belongs to an nn\.MultiheadAttention"):
        get_peft_model(model, config("qr", target_modules=["out_proj"]))


def test_all_linear_and_none_choose_what_they_choose_for_lora() -> None:
    for targets in ("all-linear", None, r".*layer\.1.*(key|output\.dense)"):
        lora = get_peft_model(bert(), LoraConfig(target_modules=targets)).base_model
        ours = get_peft_model(bert(), config("qr", target_modules=targets)).base_model
        assert ours.targeted_module_names == lora.targeted_module_names
        assert layers(ours.model).keys() == set(lora.targeted_module_names)


def test_a_deleted_adapter_leaves_nothing() -> None:
    model = get_peft_model(bert(), config("lora_xs"))
    model.add_adapter("other", config("lora_xs", seed=1, basis="random"))
    before = predictions(model)
    model.delete_adapter("other")
    for layer in layers(model).values():
        assert len(layer.factors_of._modules) == 1
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "other" not in getattr(layer, attribute)
    assert torch.equal(predictions(model), before)
