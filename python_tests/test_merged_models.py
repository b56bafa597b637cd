"""Merged models in the hands of other libraries: written, reloaded, resized, tied."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import qrlora_kernels as qk

ADAPTERS = {"qr": {"rank": 4}, "lora_xs": {"rank": 4}, "ohora": {}}
IDS = torch.arange(6)[None]


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.3,
            tie_word_embeddings=tied,
        )
    ).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    ).eval()


MODELS = {
    "Llama": (llama, ["q_proj", "down_proj"]),
    "GPT-2": (gpt2, ["c_attn", "mlp.c_proj"]),
    "BERT": (bert, ["query", "output.dense"]),
}


def adapted(make, targets, adapter: str = "qr") -> nn.Module:
    model = qk.adapt(make(), targets, adapter, progress=False, **ADAPTERS[adapter]).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in qk.adapted_layers(model).values():
            for name in layer.trainables:
                getattr(layer, name).add_(0.5 * torch.randn(getattr(layer, name).shape))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.filterwarnings("ignore:.*stays frozen as it was drawn")
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", MODELS)
def test_a_merged_model_is_written_with_its_update_and_reloads_plain(family, adapter, tmp_path):
    make, targets = MODELS[family]
    model = adapted(make, targets, adapter)
    y = logits(model)
    qk.merge(model)
    merged = logits(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), merged)  # Conv1D adds its bias elsewhere
    assert sorted(again.state_dict()) == sorted(make().state_dict())
    assert (merged - logits(make())).abs().max() > 100 * (merged - y).abs().max()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = make()
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    torch.testing.assert_close(logits(again), merged)
    assert torch.equal(logits(qk.unmerge(model)), y)
    model.save_pretrained(tmp_path / "adapted")  # Trainer's checkpoints: base and factors apart
    assert any(key.endswith(ADAPTED_KEYS) for key in _saved(tmp_path / "adapted"))


ADAPTED_KEYS = (".lam", ".core", ".a0")


def _saved(folder: os.PathLike[str]) -> list[str]:
    return list(load_file(os.path.join(folder, "model.safetensors")))


def test_a_state_of_safetensors_is_the_merged_one(tmp_path):
    model = qk.merge(adapted(llama, ["q_proj"]))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    again = llama()
    again.load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert torch.equal(logits(again), logits(model))


def test_a_resized_output_embedding_is_missed_by_name(tmp_path):
    """resize_token_embeddings puts a plain Linear where the adapter was."""
    model = adapted(llama, ["q_proj", "lm_head"])
    model.resize_token_embeddings(40)
    assert type(model.lm_head) is nn.Linear
    gone = r"no longer adapted.*lm_head"
    for call in (
        lambda: qk.summary(model),
        lambda: qk.save_adapter(model, tmp_path / "a.safetensors"),
        lambda: qk.merge(model),
        lambda: qk.unmerge(model),
        lambda: qk.refresh(model),
    ):
        with pytest.warns(UserWarning, match=gone):
            call()
    loaded = qk.load_adapter(llama(), tmp_path / "a.safetensors")
    assert list(qk.adapted_layers(loaded)) == ["model.layers.0.self_attn.q_proj"]
    qk.adapt(model, ["lm_head"], rank=4, progress=False)  # taken again
    assert len(qk.adapted_layers(model)) == 2
    qk.unload(model)
    assert type(model.lm_head) is nn.Linear


def test_a_layer_that_set_submodule_replaced_is_missed_by_name():
    model = adapted(llama, ["q_proj", "k_proj"])
    model.set_submodule("model.layers.0.self_attn.k_proj", nn.Linear(16, 16, bias=False))
    with pytest.warns(UserWarning, match=r"no longer adapted.*: .*self_attn\.k_proj$"):
        qk.merge(model)


def test_a_model_without_any_adapter_left_says_which_are_gone():
    model = adapted(llama, ["lm_head"])
    model.resize_token_embeddings(40)
    with pytest.raises(ValueError, match=r"got none.*lm_head"):
        qk.merge(model)


def test_resized_while_merged():
    model = qk.merge(adapted(llama, ["q_proj", "lm_head"]))
    want = logits(model)
    model.resize_token_embeddings(40)
    assert torch.equal(logits(model)[..., :32], want)  # the update is in what was copied
    with pytest.warns(UserWarning, match="no longer adapted"):
        qk.unmerge(model)
    assert not any(layer.merged for layer in qk.adapted_layers(model).values())


def test_tied_weights_are_refused_at_merge_by_name_and_tied_again_after():
    model = adapted(lambda: llama(tied=True), ["lm_head", "q_proj"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"lm_head\.weight must .*alone.*embed_tokens"):
        qk.merge(model)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(layer.merged for layer in qk.adapted_layers(model).values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    y = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), y)


def test_tied_while_merged_the_tie_is_the_new_base():
    model = qk.merge(adapted(llama, ["lm_head"]))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.lm_head.weight = model.model.embed_tokens.weight
    assert not model.lm_head.merged
    qk.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.base_changed()


def test_a_layer_that_something_was_put_around_is_not_missed(tmp_path, recwarn):
    class Around(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

        def forward(self, x):
            return self.base_layer(x)

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    qk.adapt(model, ["0", "1"], rank=2, progress=False)
    model[0] = Around(model[0])
    qk.save_adapter(model, tmp_path / "a.safetensors")
    assert [str(w.message) for w in recwarn if "no longer adapted" in str(w.message)] == []
