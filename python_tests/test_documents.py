"""Every code block of the README and of the pages runs."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qrlora_kernels as qk

TREE = Path(__file__).parents[1]
PAGES = [TREE / "README.md", *sorted((TREE / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
HUB_NAME = re.compile(r'^name = ".*"$', re.MULTILINE)
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
]


def tiny_classifier(folder: Path) -> str:
    """A model and its tokenizer as a hub's folder has them."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "dull"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def names(folder: Path) -> dict[str, Any]:
    """What the blocks take for given."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    start = qk.linalg.pivoted_qr(linear.weight.detach(), rank=4)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    net = nn.Module()
    net.classifier = nn.Linear(8, 2)
    for i in range(2):
        block = nn.Module()
        block.attention, block.value = nn.Module(), nn.Linear(8, 8)
        block.attention.query = nn.Linear(8, 8)
        net.add_module(str(i), block)
    return {
        "qk": qk,
        "torch": torch,
        "nn": nn,
        "F": nn.functional,
        "sentences": [("a fine film", 1), ("a dull film", 0)] * 4,
        "linear": linear,
        "x": torch.randn(5, 64),
        "W": linear.weight.detach(),
        "weight": linear.weight.detach(),
        "b": linear.bias.detach(),
        "bias": linear.bias.detach(),
        "weights": [torch.randn(160, 192), torch.randn(192, 160)],
        "q": start.q,
        "r": start.r,
        "lam": torch.zeros(4),
        "scaling": 1.0,
        "net": net,
        "checkpoint": model.state_dict(),
        "model": qk.adapt(model, ["0", "1"], rank=4, progress=False),
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    space = names(tmp_path)
    if HUB_NAME.search(block):
        block = HUB_NAME.sub(f"name = {tiny_classifier(tmp_path)!r}", block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(block, "block", "exec"), space)
    if "save_pretrained" in block:
        assert_written_merged(space["model"], tmp_path / "out" / "merged")


def assert_written_merged(model: nn.Module, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    written = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    with torch.no_grad():
        assert torch.equal(written(ids).logits, model.eval()(ids).logits)
    assert "adapter.safetensors" in os.listdir(folder.parent)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 4
