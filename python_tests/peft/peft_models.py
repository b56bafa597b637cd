"""What the tests of the PEFT methods share: tiny random models, configs, adapters that moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import qrlora_kernels.peft as qkp

TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}
# Each adapter as a test of files wants it: alpha and ranks that differ from layer to layer.
CONFIGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "qr_tau": (qkp.QRLoraConfig, {"tau": 0.6}),
    "qr": (qkp.QRLoraConfig, {"r": 4, "alpha": 8.0}),
    "lora_xs": (qkp.LoraXSConfig, {"r": 4, "alpha": 8.0}),
    "ohora": (qkp.OHoraConfig, {"columns": "selected"}),
}
DTYPES = (torch.float32, torch.bfloat16)


def config(adapter: str, **options: Any) -> Any:
    kind, own = CONFIGS[adapter]
    return kind(**({"target_modules": TARGETS["bert"]} | own | options))


def bert(seed: int = 0, dtype: torch.dtype = torch.float32, labels: int = 3) -> Any:
    """A classifier of two layers; its weights are large enough for attention to matter."""
    torch.manual_seed(seed)
    sizes = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
        num_labels=labels,
    )
    return BertForSequenceClassification(sizes).to(dtype).eval()


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    sizes = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(sizes).to(dtype).eval()


def gpt2(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    sizes = GPT2Config(
        vocab_size=40, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
    )
    return GPT2LMHeadModel(sizes).to(dtype).eval()


def tokens() -> Tensor:
    return torch.randint(2, 40, (4, 9), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def predictions(model: nn.Module) -> Tensor:
    logits: Tensor = model.eval()(input_ids=tokens()).logits
    return logits


def move(model: nn.Module, seed: int = 1, by: float = 0.3) -> None:
    """A step in everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = by * torch.randn(parameter.shape, generator=generator)
                parameter.add_(step.to(parameter.dtype))


def adapted(adapter: str, base: nn.Module | None = None, **options: Any) -> PeftModel:
    """A classifier with the adapter on it, moved."""
    model = get_peft_model(bert() if base is None else base, config(adapter, **options))
    move(model)
    return model.eval()


def saved(folder: Path, adapter: str, base: nn.Module | None = None, **options: Any) -> Tensor:
    """Write the adapter into ``folder``; what the model predicts with it."""
    model = adapted(adapter, base, **options)
    model.save_pretrained(folder)
    return predictions(model)


def layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by their names in the base."""
    found = {
        n: m for n, m in model.named_modules() if type(m).__module__ == "qrlora_kernels.peft.layer"
    }
    return {
        n.removeprefix("base_model.model."): m for n, m in found.items() if hasattr(m, "base_layer")
    }


def refusal(call: Any) -> str:
    """What the error says that ``call`` ends in; empty if it ends in none."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return ""
