"""What the tests of exports share: tiny models with adapters of uneven ranks that have moved."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from saved import refusal
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import qrlora_kernels as qk

__all__ = ["refusal"]

IDS = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(5))
# The layers of each model by the ranks that they get.
RANKS: dict[str, dict[str, int]] = {
    "llama": {
        "model.layers.0.self_attn.q_proj": 3,
        "model.layers.0.self_attn.v_proj": 5,
        "model.layers.1.self_attn.q_proj": 7,
        "model.layers.1.self_attn.v_proj": 4,
        "model.layers.1.mlp.down_proj": 2,
    },
    "gpt2": {"transformer.h.0.attn.c_attn": 3, "transformer.h.1.attn.c_proj": 6},
    "bert": {
        "bert.encoder.layer.0.attention.self.query": 3,
        "bert.encoder.layer.0.attention.output.dense": 2,
        "bert.encoder.layer.1.output.dense": 5,
    },
}


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return LlamaForCausalLM(sizes).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
    )
    return GPT2LMHeadModel(sizes).eval()


def bert() -> Any:
    torch.manual_seed(0)
    sizes = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        initializer_range=0.2,
        num_labels=3,
    )
    return BertForSequenceClassification(sizes).eval()


BASES: dict[str, Callable[[], Any]] = {"llama": llama, "gpt2": gpt2, "bert": bert}


def move(model: nn.Module, seed: int = 1, by: float = 0.1) -> None:
    """A step in everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = by * torch.randn(parameter.shape, generator=generator)
                parameter.add_(step.to(parameter.dtype))


def adapt(model: Any, ranks: dict[str, int], adapter: str = "qr", **options: Any) -> Any:
    """Each layer with a rank of its own; moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, rank in ranks.items():
            qk.adapt(
                model, re.compile(re.escape(name)), adapter, rank=rank, progress=False, **options
            )
    move(model)
    return model.eval()


def adapted(name: str, adapter: str = "qr", dtype: torch.dtype = torch.float32, **options: Any):
    """One of the three models; BERT with a head that trained."""
    if name == "bert":
        options = {"trainable": ["classifier"]} | options
    return adapt(BASES[name]().to(dtype), RANKS[name], adapter, **options)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    answer: Tensor = model.eval()(input_ids=IDS).logits
    return answer


@torch.no_grad()
def meant(model: nn.Module) -> dict[str, Tensor]:
    """ΔW of each layer."""
    return {n: layer.delta_weight().double() for n, layer in qk.adapted_layers(model).items()}


def distance(found: Tensor, wanted: Tensor, base: Tensor) -> float:
    """Relative to what the adapter changes."""
    return float((found - wanted).double().norm() / (wanted - base).double().norm())


def files_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []
