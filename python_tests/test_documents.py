"""Every code block of the guides runs; every file and name that words speak of exists."""

from __future__ import annotations

import contextlib
import functools
import importlib
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


def tiny_encoder() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertModel(
        transformers.BertConfig(vocab_size=9, intermediate_size=64, **sizes)
    )


def names(folder: Path) -> dict[str, Any]:
    """What the blocks take for given."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    start = qk.linalg.pivoted_qr(linear.weight.detach(), rank=4)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x, labels = torch.randn(5, 64), torch.arange(5)
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
        "x": x,
        "labels": labels,
        "batches": [(["ada", "bob", "ada", "bob", "bob"], x, labels)] * 2,
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
        "base": tiny_encoder(),
        "batch": {"input_ids": torch.arange(1, 9).repeat(4, 1)},
        "model": qk.adapt(model, ["0", "1"], rank=4, progress=False),
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "BitsAndBytesConfig" in block:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    space = names(tmp_path)
    if HUB_NAME.search(block):
        block = HUB_NAME.sub(f"name = {tiny_classifier(tmp_path)!r}", block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(block, "block", "exec"), space)
    if "out/merged" in block:
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


# --- what is spoken of


FOLDERS = ("bench", "csrc", "docs", "examples", "python_tests", "qrlora_kernels")
SUFFIXES = {".md", ".py", ".txt", ".sh", ".h", ".cpp", ".cu", ".cuh"}
# From the root of the tree, or a file from the root of the package.
ROOMS = "adapters|backends|dispatch|linalg|model|native|nn|ops"
PATH = re.compile(rf"(?<![\w./-])(?:(?:{'|'.join(FOLDERS)})/[\w./-]*\w|(?:{ROOMS})/\w+\.py)")
WRITTEN_THERE = ("bench/out", "python_tests/nets/fixtures-VERSION")
GUIDES = [*PAGES, TREE / "CONTRIBUTING.md"]
DOTTED = re.compile(r"`(?:qrlora_kernels|qk)\.([\w.]*\w)")


def missing_paths(text: str) -> list[str]:
    """The paths in ``text`` that lead nowhere; what runs write is not looked for."""
    return [
        path
        for path in PATH.findall(text)
        if not path.startswith(WRITTEN_THERE)
        and not any((root / path).exists() for root in (TREE, TREE / "qrlora_kernels"))
    ]


def sources() -> list[Path]:
    files = [*TREE.glob("*.md"), TREE / "CMakeLists.txt"]
    for folder in FOLDERS:
        files += [p for p in sorted((TREE / folder).rglob("*")) if p.suffix in SUFFIXES]
    return [p for p in files if "out" not in p.relative_to(TREE).parts]


def missing_names(text: str) -> list[str]:
    """The dotted names of this package in ``text`` that it does not have."""
    return [name for name in DOTTED.findall(text) if not _has(name)]


def _has(name: str) -> bool:
    """Modules first: ``model.adapt`` is one, and a function of the folder besides."""
    parts, found = name.split("."), qk
    with contextlib.suppress(ModuleNotFoundError):
        while parts:
            found = importlib.import_module(f"{found.__name__}.{parts[0]}")
            parts = parts[1:]
    return functools.reduce(lambda one, part: getattr(one, part, None), parts, found) is not None


def test_paths_in_words_and_comments_lead_somewhere() -> None:
    found = {str(p.relative_to(TREE)): missing_paths(p.read_text("utf-8")) for p in sources()}
    assert len(found) > 300
    assert {path: missing for path, missing in found.items() if missing} == {}


def missing_steps(text: str) -> list[str]:
    """Of the names in a guide to the code those that neither the package nor the core has.

    They are below the package, with a dot at least, or the core's, with ``::``.
    """
    core = "".join(p.read_text("utf-8") for p in (TREE / "csrc").rglob("*") if p.is_file())
    python = [name for name in re.findall(r"`(\w+(?:\.\w+)+)`", text) if name[-3:] != ".py"]
    names = re.findall(r"`\w+::(\w+)`", text)
    return [name for name in python if not _has(name)] + [
        name for name in names if not re.search(rf"\b{name}\)?\(", core)
    ]


def test_names_of_the_trips_exist() -> None:
    text = (TREE / "docs" / "architecture.md").read_text("utf-8")
    assert text.count("::") >= 5
    assert missing_steps(text) == []
    assert missing_steps("`ops.low_rank.all`, `Plans::ask_python` and `ops.low_rank.call`") == [
        "ops.low_rank.all",
        "ask_python",
    ]


def test_names_in_the_guides_exist() -> None:
    found = {p.name: missing_names(p.read_text("utf-8")) for p in GUIDES}
    assert {name: missing for name, missing in found.items() if missing} == {}


def test_what_is_gone_is_noticed() -> None:
    old = "qrlora_kernels/backends/" + "measured.py"  # apart: this file is looked through too
    assert missing_paths(f"see `{old}` and bench/results") == [old]
    assert missing_names("`qrlora_kernels.backends.chosen` and `qk.backends.choose(...)`") == [
        "backends.chosen"
    ]
