"""Whole models: those that transformers quantised, banks, a bias that trains, pickles, FSDP's
storage of codes."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from quantised_models import BITSANDBYTES, KINDS, adapt, library, linear, move, net, x
from torch import nn

import qrlora_kernels as qk
from qrlora_kernels.nn import base_weight

of_each_kind = pytest.mark.parametrize("kind", KINDS)
IDS = torch.arange(16).view(2, 8)


def _settings(kind):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if kind == "torchao":
        library("torchao")
        from torchao.quantization import IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup

        return transformers.TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    library("bitsandbytes")
    if kind == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture
def llama(tmp_path):
    """A loader of one small model in each kind."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
    )
    transformers.LlamaForCausalLM(sizes).bfloat16().save_pretrained(tmp_path / "base")

    def load(kind):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "base",
                quantization_config=_settings(kind),
                dtype=torch.bfloat16,
                device_map="cpu",
            ).train()

    return load


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao"])
def test_a_transformers_model(kind, llama, tmp_path):
    """Adapts, starts at the base, trains under Trainer, saves, loads, generates, merges."""
    transformers = pytest.importorskip("transformers")
    model = llama(kind)
    want = model(IDS).logits
    qk.adapt(model, "all-linear", rank=8, progress=False)
    assert len(qk.adapted_layers(model)) == 14
    assert (model(IDS).logits.double() - want.double()).norm() <= 1e-2 * want.double().norm()
    rows = [{"input_ids": row, "labels": row} for row in IDS] * 8
    settings = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=2, learning_rate=0.1, save_strategy="no", report_to=[]
    )
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, settings, train_dataset=rows)
    model._hf_peft_config_loaded = True
    trainer = transformers.Trainer(model, settings, train_dataset=rows)
    model._hf_peft_config_loaded = False
    trainer.train()
    assert all(bool(layer.lam.any()) for layer in qk.adapted_layers(model).values())
    want = model.train()(IDS).logits
    qk.save_adapter(model, tmp_path / "a")
    other = qk.load_adapter(llama(kind), tmp_path / "a")
    assert torch.equal(other(IDS).logits, want)
    assert other.eval().generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 10)
    assert torch.equal(other(IDS).logits, model.eval()(IDS).logits)
    qk.unload(model, dequantize=torch.bfloat16)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert (model(IDS).logits.double() - want.double()).norm() <= 3e-2 * want.double().norm()


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao"])
def test_it_is_written_merged_and_dense(kind, llama, tmp_path):
    """And read by transformers alone; layers that were not adapted are dense there too."""
    transformers = pytest.importorskip("transformers")
    model = move(qk.adapt(llama(kind), ["q_proj", "down_proj"], rank=8, progress=False))
    want = model(IDS).logits
    with pytest.raises(ValueError, match=r"must be dense to be written merged.*dequantize=True"):
        qk.to_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    qk.to_merged(model, tmp_path / "merged", dequantize=True)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == torch.bfloat16
    assert type(plain.model.layers[0].self_attn.k_proj) is nn.Linear
    assert (plain(IDS).logits.double() - want.double()).norm() <= 3e-2 * want.double().norm()
    assert torch.equal(model(IDS).logits, want)


def test_it_is_written_as_a_lora(llama, tmp_path):
    peft = pytest.importorskip("peft")
    model = move(qk.adapt(llama("nf4"), ["q_proj", "down_proj"], rank=8, progress=False))
    with torch.no_grad():
        for layer in qk.adapted_layers(model).values():
            layer.lam.mul_(10)
    qk.to_lora(model, tmp_path / "lora")
    other = peft.PeftModel.from_pretrained(llama("nf4"), tmp_path / "lora").train()
    want, base = model(IDS).logits.double(), llama("nf4")(IDS).logits.double()
    assert (want - base).norm() > 3e-2 * base.norm()
    assert (other(IDS).logits.double() - want).norm() <= 2e-2 * want.norm()


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_a_model_is_pickled(kind):
    """bitsandbytes' weights lose their class there, and keep what hangs on them."""
    model = move(adapt(net(kind)))
    want = model(x())
    assert torch.equal(pickle.loads(pickle.dumps(model))(x()), want)
    qk.merge(model, dequantize=torch.bfloat16)
    other = qk.unmerge(pickle.loads(pickle.dumps(model)))
    assert torch.equal(other(x()), want)


@of_each_kind
def test_a_bias_that_trains(kind):
    model = adapt(net(kind), trainable=["first.bias"])
    assert model.first.bias.dtype == torch.float32
    model(x()).float().sum().backward()
    assert model.first.bias.grad.abs().sum() > 0
    with torch.no_grad():
        model.first.bias.add_(1)
    want = model(x())
    with qk.disabled(model):
        assert (model(x()).float() - want.float()).norm() <= 1e-2 * want.float().norm()
    assert model.first.bias.dtype == torch.float32
    qk.unload(model, dequantize=torch.bfloat16)
    assert model.first.bias.dtype == torch.bfloat16


@of_each_kind
def test_rows_of_a_bank_are_packed_and_come_back(kind, tmp_path):
    model = adapt(net(kind))
    bank = qk.AdapterBank(model, capacity=2)
    bank.add("a", {n: torch.ones_like(t) for n, t in _state(model).items()})
    bank.pack(tmp_path / "bank")
    bank.save("a", tmp_path / "a")
    other = qk.AdapterBank(adapt(net(kind)), capacity=3)
    other.load(tmp_path / "bank")
    other.load({"b": tmp_path / "a"})
    assert all(
        torch.equal(other.state(n)[key], one) for n in "ab" for key, one in bank.state("a").items()
    )
    wrong = qk.AdapterBank(adapt(net(kind, seed=1)), capacity=2)
    for path in ("bank", "a"):
        with pytest.raises(ValueError, match="base"):
            wrong.load(tmp_path / path)


def _state(model):
    return {
        f"{name}.{key}": getattr(layer, key).detach()
        for name, layer in qk.adapted_layers(model).items()
        for key in layer.trainables
    }


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_that_are_stored_as_floats(storage):
    """As FSDP asks for: their bits may be any float, a NaN too."""
    bnb = library("bitsandbytes").nn
    torch.manual_seed(0)
    layer = bnb.Linear4bit(
        64, 96, quant_type="nf4", quant_storage=storage, compute_dtype=torch.bfloat16
    )
    layer.weight = bnb.Params4bit(
        linear(torch.bfloat16).weight.data, quant_type="nf4", quant_storage=storage
    )
    layer = layer.to("cpu").train()
    assert layer.weight.dtype == storage
    model = qk.adapt(nn.Sequential(layer), ["0"], rank=6, progress=False)
    plain = net("nf4").first
    same = qk.QRLinear.from_linear(plain, rank=6)
    assert torch.equal(model[0].pivots, same.pivots)
    want = move(model)(x())
    model.load_state_dict(model.state_dict())
    assert torch.equal(model(x()), want)
    assert model[0].q.dtype == torch.bfloat16


def test_tuning_and_explaining_ask_for_no_dense_weight(monkeypatch):
    model = adapt(net("nf4"))

    def dense(*_):
        raise AssertionError("a dense weight was made")

    monkeypatch.setattr(type(base_weight.quantised(model.first)), "dense", dense)
    assert model.first.explain(16, "bwd").reason
    qk.tune(model, tokens=[4])
