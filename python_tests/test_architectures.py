"""Real architectures: PyTorch's encoder with its fast path, BERT, and GPT-2 with its Conv1D."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import qrlora_kernels as qk


def test_transformer_encoder_uses_its_adapters_in_inference():
    """PyTorch's fast path reads linear1 and linear2 and never calls them, adapters or not."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
        qk.adapt(model, ["linear1", "linear2"], rank=4, progress=False)
        torch.testing.assert_close(
            model(x, src_key_padding_mask=padding)[~padding], before[~padding]
        )
        for adapted in qk.adapted_layers(model).values():
            adapted.lam.fill_(1.0)
        fast = model(x, src_key_padding_mask=padding)
    slow = model(x, src_key_padding_mask=padding)
    assert (fast - before)[~padding].abs().max() > 0.01
    torch.testing.assert_close(fast[~padding], slow[~padding])


def test_all_linear_passes_over_bypassed_layers():
    model = nn.TransformerEncoderLayer(16, 2, 32)
    assert list(qk.adapted_layers(qk.adapt(model, "all-linear", rank=4, progress=False))) == [
        "linear1",
        "linear2",
    ]


def _bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Conv1D):
                layer.weight.mul_(5)  # from 0.02, where four numbers a layer move nothing
    return model


@pytest.mark.parametrize(
    ("make", "targets", "trainable"),
    [(_bert, ["query", "value"], "classifier"), (_gpt2, ["c_attn", "mlp.c_fc"], ())],
)
@pytest.mark.parametrize("adapter", ["qr", "lora_xs", "ohora"])
def test_transformers_models_train_and_come_back(make, targets, trainable, adapter):
    model = make()
    bits = {n: p.clone() for n, p in model.named_parameters()}
    qk.adapt(model, targets, adapter, rank=4, trainable=trainable, progress=False)
    ids = torch.randint(0, 50, (8, 12), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 0] % 2 if make is _bert else ids
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for _ in range(25):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.02
    model.eval()
    want = model(input_ids=ids).logits
    merged = qk.merge(copy.deepcopy(model))(input_ids=ids).logits
    torch.testing.assert_close(merged, want, rtol=1e-4, atol=1e-4)
    qk.unload(model, merge=False)
    after = dict(model.named_parameters())
    assert list(after) == list(bits)
    changed = {n for n, old in bits.items() if not helpers.same_bits(after[n], old)}
    assert changed == ({"classifier.weight", "classifier.bias"} if trainable else set())
    kind = Conv1D if make is _gpt2 else nn.Linear
    assert all(type(m) is kind for n, m in model.named_modules() if n.endswith(tuple(targets)))
