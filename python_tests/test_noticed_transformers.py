"""Models of transformers in training: nothing is said of adapters that all take part."""

from __future__ import annotations

import warnings

import pytest
import torch

import qrlora_kernels as qk

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(12).reshape(2, 6) % 9


def bert():
    config = transformers.BertConfig(vocab_size=11, intermediate_size=32, **SMALL)
    return transformers.BertForMaskedLM(config), {"input_ids": IDS, "labels": IDS}


def llama():
    config = transformers.LlamaConfig(
        vocab_size=11, intermediate_size=32, num_key_value_heads=1, **SMALL
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": IDS, "labels": IDS}


def gpt2():
    config = transformers.GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config), {"input_ids": IDS, "labels": IDS}


def t5():
    config = transformers.T5Config(
        vocab_size=11,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": IDS, "labels": IDS}


def vit():
    config = transformers.ViTConfig(
        intermediate_size=32, image_size=8, patch_size=4, num_labels=3, **SMALL
    )
    given = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])}
    return transformers.ViTForImageClassification(config), given


MODELS = [bert, llama, gpt2, t5, vit]


@pytest.mark.parametrize("recompute", [None, False, True])
@pytest.mark.parametrize("make", MODELS)
def test_ordinary_models_hear_nothing(make, recompute):
    torch.manual_seed(0)
    model, given = make()
    trainable = ["classifier"] if make is vit else []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        qk.adapt(model, "all-linear", rank=2, trainable=trainable, progress=False)
    model.eval()
    model(**given)
    model.train()
    if recompute is not None:
        model.gradient_checkpointing_enable({"use_reentrant": recompute})
        if make is vit:
            given["pixel_values"].requires_grad_()
        else:
            model.enable_input_require_grads()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**given).loss.backward()
        model(**given).loss.backward()
    said = [str(one.message) for one in caught]
    assert not [text for text in said if "adapted layers" in text or "gradient to" in text]
    for layer in qk.adapted_layers(model).values():
        assert layer.lam.grad is not None


@pytest.mark.parametrize("make", [bert, gpt2])
def test_disabled_and_scaled_to_nothing_give_the_bits_of_the_base(make):
    torch.manual_seed(0)
    model, given = make()
    model.eval()
    before = model(**given).logits
    qk.adapt(model, "all-linear", rank=2, progress=False)
    with torch.no_grad():
        for layer in qk.adapted_layers(model).values():
            layer.lam.normal_()
    assert not torch.allclose(model(**given).logits, before)
    with qk.disabled(model):
        assert torch.equal(model(**given).logits, before)
    qk.scale(model, 0)
    assert torch.equal(model(**given).logits, before)
