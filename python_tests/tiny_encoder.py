"""A random encoder of two layers over ten words, and rows for it: the example in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from finetuning.data import Data, Split, write_tsv
from finetuning.settings import Settings
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "eats", "the"]


def write_model(folder: Path, width: int = 32, layers: int = 2) -> Path:
    """A folder with a random BERT, its MLP twice as wide, and its tokenizer."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        initializer_range=0.3,  # large enough for attention to matter
    )
    BertModel(config).save_pretrained(folder)
    return folder


def make_settings(folder: Path, model: Path) -> Settings:
    """Two epochs of QR-LoRA on 56 pairs, 24 to evaluate on: does the first name a cat?"""
    generator = torch.Generator().manual_seed(0)
    columns = tuple(
        [
            " ".join(WORDS[i] for i in torch.randint(10, (5,), generator=generator))
            for _ in range(80)
        ]
        for _ in range(2)
    )
    labels = [str(int("cat" in a)) for a in columns[0]]
    split = Split(columns, labels)
    data = Data(split.take(range(56)), split.take(range(56, 80)), ("0", "1"))
    train_file, eval_file = write_tsv(data, folder / "data")
    return Settings(
        adapter="qr",
        train_file=train_file,
        eval_file=eval_file,
        out=folder / "out",
        model=str(model),
        epochs=2,
        batch_size=8,
        precision="fp32",
        progress=False,
    )
