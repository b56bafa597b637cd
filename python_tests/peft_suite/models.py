"""Random models of a few thousand parameters, in folders called like the hub's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_WIDTHS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    # Eight times the usual: an adapter's change must not drown in the tests' absolute tolerance.
    "initializer_range": 0.16,
}
# The tests feed tokens 1 and 2, which must be none of these: the embedding of the padding is zero,
# and a sequence that begins with the end is one that generates nothing.
_TOKENS = {"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 6}
_FEW_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}

_INTERNAL, _TRL, _HF = "peft-internal-testing", "trl-internal-testing", "hf-internal-testing"
# folder: (model class, options of its config beside the widths and the tokens)
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{_INTERNAL}/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.16},
    ),
    f"{_INTERNAL}/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", {}),
    f"{_INTERNAL}/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {"rotary_dim": 4}),
    f"{_TRL}/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _FEW_HEADS),
    f"{_INTERNAL}/tiny-dummy-qwen2": (
        "Qwen2ForCausalLM",
        # The tests convert adapters of this one alone to LoRA of rank 4: it is the smallest.
        {"hidden_size": 8, "num_key_value_heads": 2, "intermediate_size": 16},
    ),
    f"{_HF}/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", _FEW_HEADS),
    f"{_INTERNAL}/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        {"num_decoder_layers": 2, "d_kv": 8, "d_ff": 48, "decoder_start_token_id": 0},
    ),
    f"{_INTERNAL}/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        {
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "init_std": 0.16,
            "decoder_start_token_id": 6,
            "forced_eos_token_id": None,
        },
    ),
    f"{_INTERNAL}/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", {}),
    f"{_INTERNAL}/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        {},
    ),
    f"{_TRL}/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        _FEW_HEADS,
    ),
    f"{_INTERNAL}/tiny-random-BertModel": ("BertModel", {}),
    f"{_INTERNAL}/tiny-random-RobertaModel": ("RobertaModel", {}),
    f"{_INTERNAL}/tiny-random-DebertaModel": ("DebertaModel", _DEBERTA),
    f"{_INTERNAL}/tiny-random-DebertaV2Model": ("DebertaV2Model", _DEBERTA),
}
# An adapter's config, which PEFT's tests of configs load from the hub.
_ADAPTER = f"{_INTERNAL}/tiny-opt-lora-revision"


def write_models(root: Path) -> None:
    """Write each model's folder under ``root``, the same numbers on every call."""
    transformers.utils.logging.disable_progress_bar()
    for name, (architecture, options) in _MODELS.items():
        torch.manual_seed(0)
        _build(architecture, options).save_pretrained(root / name)
    _write_tokenizer(root / f"{_TRL}/tiny-random-LlamaForCausalLM")
    adapter = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "runtime_config": None}
    (root / _ADAPTER).mkdir(parents=True)
    text = json.dumps(adapter)
    (root / _ADAPTER / "adapter_config.json").write_text(text, encoding="utf-8")


def _build(architecture: str, options: dict[str, Any]) -> PreTrainedModel:
    model_class: type[PreTrainedModel] = getattr(transformers, architecture)
    config_class: type[PretrainedConfig] = model_class.config_class
    return model_class(config_class(**(_WIDTHS | _TOKENS | options)))


def _write_tokenizer(folder: Path) -> None:
    words = Tokenizer(WordLevel({f"word{i}": i for i in range(_WIDTHS["vocab_size"])}, "word0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="word0").save_pretrained(folder)
