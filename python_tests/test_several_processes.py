"""examples/several_processes.py: two processes reach the single-process losses, save and reload."""

from __future__ import annotations

import importlib.util
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import several_processes
import torch
from finetuning.model import PACKAGED, model_folder
from transformers import BertConfig, BertModel

SCRIPT = Path(several_processes.__file__)
RUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCH = (
    sys.executable, "-m", "accelerate.commands.launch",
    "--multi_gpu", "--num_processes", "2", "--main_process_port", "0",
)  # fmt: skip
WORDS = ["good", "fine", "great", "warm", "bad", "dull", "poor", "cold", "film", "plot"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small model with the packaged one's words, and sentences, as options of the script."""
    if importlib.util.find_spec(PACKAGED) is None:
        pytest.skip(f"the words are those of {PACKAGED}, which is not installed")
    folder = tmp_path_factory.mktemp("several")
    model = folder / "model"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(num_hidden_layers=2, **shape)).save_pretrained(model)
    for file in Path(model_folder("")).glob("*token*"):
        shutil.copy(file, model)
    shutil.copy(Path(model_folder("")) / "vocab.txt", model)
    drawn = random.Random(0)
    rows = []
    for i in range(64):
        sentence = " ".join([*drawn.sample(WORDS, 4), WORDS[4 * (i % 2)]])
        rows.append(f"{sentence} {i}\t{('yes', 'no')[i % 2]}")
    (folder / "data.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    return [
        "--model", str(model), "--data", str(folder / "data.tsv"), "--steps", "11",
        "--batch-size", "8",
    ]  # fmt: skip


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "adapter", "start"),
    [("ddp", "lora_xs", RUN), ("fsdp2", "qr", RUN), ("accelerate", "ohora", LAUNCH)],
)
def test_two_processes_reach_the_losses_of_one(
    how: str,
    adapter: str,
    start: tuple[str, ...],
    given: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if how == "accelerate":
        pytest.importorskip("accelerate")
    arguments = [*given, "--adapter", adapter]
    assert several_processes.main([*arguments, "--how", "alone", "--out", str(tmp_path / "1")]) == 0
    alone = losses(capsys.readouterr().out)
    assert abs(alone[-1] - alone[0]) > 1e-3  # it trains: there is something to agree on
    command = [*start, str(SCRIPT), *arguments, "--how", how, "--out", str(tmp_path / "2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(done.stdout) == pytest.approx(alone, abs=2e-6)
    assert done.stdout.count("predictions agree") == 2


@pytest.mark.parametrize(
    ("how", "said"), [("ddp", "torchrun"), ("fsdp2", "torchrun"), ("accelerate", "launch")]
)
def test_one_process_alone_is_told_who_starts_several(
    how: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert several_processes.main(["--how", how]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--steps", "0", "--steps must be 1 or more, got 0"),
        ("--batch-size", "0", "--batch-size must be 1 or more, got 0"),
        ("--batch-size", "-4", "--batch-size must be 1 or more, got -4"),
        (
            "--batch-size",
            "128",
            "--batch-size must be at most the 55 sentences",
        ),
        ("--data", "nowhere.tsv", "nowhere.tsv"),
        ("--model", "/nowhere", "/nowhere"),
    ],
)
def test_a_wrong_option_is_named(
    option: str, value: str, said: str, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert several_processes.main([*given, option, value]) == 2
    assert said in capsys.readouterr().err


def test_several_processes_do_not_each_train_alone(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert several_processes.main([*given, "--how", "alone"]) == 2
    assert "--how must be ddp, fsdp2 or accelerate in 2 processes" in capsys.readouterr().err


def with_targets(targets: list[str], given: list[str], folder: Path) -> list[str]:
    """The options with data whose rows have these targets in turn."""
    rows = [f"film {i}\t{targets[i % len(targets)]}" for i in range(60)]
    path = folder / "data.tsv"
    path.write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    return [*given, "--data", str(path), "--steps", "1", "--out", str(folder)]


def test_data_may_have_three_labels(given: list[str], tmp_path: Path) -> None:
    assert several_processes.main(with_targets(["a", "b", "c"], given, tmp_path)) == 0


def test_scores_in_place_of_labels_are_named(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert several_processes.main(with_targets(["0.5", "1.5"], given, tmp_path)) == 2
    assert "--data must have labels, got scores" in capsys.readouterr().err
