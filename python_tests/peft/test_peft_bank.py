"""A bank over a PEFT model: ``adapter_names`` of adapters that PEFT never heard of."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft_models import bert, config, tokens
from torch import Tensor

import qrlora_kernels as qk

ADAPTERS = ["qr", "qr_tau", "lora_xs", "ohora"]


def served(
    adapter: str, **options: Any
) -> tuple[Any, qk.AdapterBank, dict[str, dict[str, Tensor]]]:
    model = get_peft_model(bert(), config(adapter, **options)).eval()
    bank = qk.AdapterBank(model, 4)
    bank.add("start")
    states = {}
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        state = {
            key: t + 0.1 * torch.randn(t.shape, generator=generator)
            for key, t in bank.state("start").items()
        }
        states[f"user {seed}"] = state
        bank.add(f"user {seed}", state)
    return model, bank, states


def put(model: Any, bank: qk.AdapterBank, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for layer_name, layer in bank.layout.layers.items():
            for key, parameter in layer.trained_now().items():
                parameter.copy_(state[f"{layer_name}.{key}"])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_names_of_the_bank_and_of_peft(adapter: str) -> None:
    model, bank, states = served(adapter)
    names = ["user 1", "user 2", "__base__", "user 1"]
    with torch.no_grad():
        got = model(input_ids=tokens(), adapter_names=names).logits
        with bank.use(names):
            assert torch.equal(model(input_ids=tokens()).logits, got)
        own = model(input_ids=tokens(), adapter_names=["default"] * 4).logits
        torch.testing.assert_close(own, model(input_ids=tokens()).logits)
        with model.disable_adapter():
            base = model(input_ids=tokens()).logits
        torch.testing.assert_close(got[2], base[2], rtol=1e-5, atol=1e-5)
        for row in (0, 1, 3):
            put(model, bank, states[names[row]])
            want = model(input_ids=tokens()).logits[row]
            torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="nobody"):
        model(input_ids=tokens(), adapter_names=["user 1", "nobody", "user 1", "user 1"])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_rows_train_in_training_mode(adapter: str) -> None:
    model, bank, states = served(adapter, dropout=0.0)
    optimizer = bank.adamw(lr=0.01)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    names = ["user 1", "user 2", "user 1", "user 2"]
    before = {name: bank.state(name) for name in bank.names()}
    with bank.use(names) as batch:
        losses = model(input_ids=tokens()).logits.logsumexp(1)
        batch.mean(losses).backward()
    optimizer.step()
    put(model, bank, states["user 2"])
    model(input_ids=tokens()[[1, 3]]).logits.logsumexp(1).mean().backward()
    for layer_name, layer in bank.layout.layers.items():
        for key, parameter in layer.trained_now().items():
            mine = batch.numbers.grad[1][bank.layout.columns[f"{layer_name}.{key}"]]
            torch.testing.assert_close(mine, parameter.grad.flatten(), rtol=1e-4, atol=1e-6)
    after = {name: bank.state(name) for name in before}
    for key in states["user 1"]:
        assert not torch.equal(after["user 1"][key], before["user 1"][key])
        assert torch.equal(after["start"][key], before["start"][key])


def test_packed_files_go_and_single_ones_are_left_to_peft(tmp_path: Any) -> None:
    model, bank, _states = served("qr")
    bank.pack(tmp_path / "all.safetensors")
    other = qk.AdapterBank(model, 4)
    assert other.load(tmp_path / "all.safetensors") == ["start", "user 1", "user 2"]
    with pytest.raises(ValueError, match="PEFT"):
        bank.save("user 1", tmp_path / "one.safetensors")


def test_the_bank_has_one_active_adapter_and_none_merged() -> None:
    model, bank, _ = served("qr")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"), bank.use(["user 1"]):
        pass
    model.unmerge_adapter()
    model.add_adapter("two", config("qr"))
    model.base_model.set_adapter(["default", "two"])
    with pytest.raises(ValueError, match="active"), bank.use(["user 1"]):
        pass


def test_the_bank_goes_with_its_last_reference() -> None:
    model, bank, _ = served("qr")
    del bank
    with pytest.raises(ValueError, match="user 1"):
        model(input_ids=tokens(), adapter_names=["user 1"] * 4)


def test_copies_of_a_model_have_no_bank() -> None:
    model, _bank, _ = served("qr")
    names = ["user 1"] * 4
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(
            other(input_ids=tokens()).logits, model(input_ids=tokens()).logits
        )
        with pytest.raises(ValueError, match="user 1"):
            other(input_ids=tokens(), adapter_names=names)
    model(input_ids=tokens(), adapter_names=names)


def test_layers_merged_inside_refuse() -> None:
    model, bank, _ = served("qr")
    with bank.use(["user 1"] * 4):
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged"):
            model(input_ids=tokens())


def test_an_active_adapter_of_another_start_is_refused() -> None:
    model, bank, _ = served("lora_xs")
    model.add_adapter("same", config("lora_xs"))
    model.set_adapter("same")
    with bank.use(["user 1"] * 4):
        pass
    with torch.no_grad():
        layer = next(iter(bank.layout.layers.values()))
        layer.get_base_layer().weight.mul_(-1.0).add_(
            torch.randn_like(layer.get_base_layer().weight)
        )
    model.add_adapter("other", config("lora_xs"))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="factors"), bank.use(["user 1"] * 4):
        pass
