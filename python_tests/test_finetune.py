"""The example on a tiny encoder: every adapter, the reload check, interruption, command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import finetune
import pytest
import torch
from finetuning import adapters, report, run, training
from finetuning.data import Data, Split, write_tsv
from finetuning.memory import peak_memory
from finetuning.metrics import scores
from finetuning.model import load_model
from finetuning.settings import ADAPTERS, Settings
from safetensors.torch import load_file

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "eats", "the"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random two-layer BERT over a vocabulary of ten words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.3,  # large enough for attention to matter
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path, tiny_model) -> Settings:
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
    train_file, eval_file = write_tsv(data, tmp_path / "data")
    return Settings(
        adapter="qr",
        train_file=train_file,
        eval_file=eval_file,
        out=tmp_path / "out",
        model=str(tiny_model),
        epochs=2,
        batch_size=8,
        precision="fp32",
        progress=False,
    )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_run_trains_saves_and_reloads_the_same_predictions(settings, adapter, capsys):
    result = run.fine_tune(
        replace(settings, adapter=adapter, rank=None if adapter == "none" else 4)
    )
    assert len(result["losses"]) == 2 * 7
    assert len(result["scores"]) == len(result["seconds_an_epoch"]) == 2
    expected = {"none": 0, "qr": 4 * 4, "lora_xs": 4 * 16, "ohora": 4 * 64, "lora": 4 * 4 * 64}
    assert result["trained"] == expected[adapter]
    assert result["head"] == 2 * 33
    assert result["reload_difference"] == 0.0
    assert "24 predictions agree bit for bit" in capsys.readouterr().out
    path = settings.adapter_file
    assert result["adapter_bytes"] == path.stat().st_size
    assert json.loads(settings.result_file.read_text()) == json.loads(json.dumps(result))
    assert {p.name for p in settings.out.iterdir()} == {path.name, settings.result_file.name}


@pytest.mark.parametrize("adapter", ["qr", "lora"])
@pytest.mark.parametrize(
    ("targets", "layers"),
    [(("query",), 2), (("query", "value"), 4), ((r".*\.(key|value)",), 4), (("all-linear",), 12)],
)
def test_targets_mean_the_same_to_both_libraries(settings, adapter, targets, layers):
    settings = replace(settings, adapter=adapter, targets=targets, rank=1)
    model = adapters.attach(load_model(settings.model, 2, 0), settings)
    names = {n.partition(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    own = {n.removesuffix(".lam") for n in names if not n.startswith("head.")}
    assert len(own) == layers
    assert {"head.weight", "head.bias"} <= names


def test_a_run_depends_on_its_seed_alone(settings):
    first = run.fine_tune(settings)
    assert run.fine_tune(settings)["losses"] == first["losses"]
    assert run.fine_tune(replace(settings, seed=1))["losses"] != first["losses"]


def test_qr_lora_results_hold_the_whole_spectrum(settings):
    layers = run.fine_tune(settings)["layers"]
    assert len(layers) == 4
    for layer in layers.values():
        assert len(layer["spectrum"]) == 32
        assert layer["rank"] == len(layer["lam"])
        kept = [value > 0.5 * layer["spectrum"][0] for value in layer["spectrum"]]
        assert sum(kept) == layer["rank"]
        assert any(value != 0.0 for value in layer["lam"])


@pytest.mark.parametrize("adapter", ["qr", "lora"])
def test_an_adapter_that_reloads_differently_fails_loudly(settings, adapter, monkeypatch):
    settings = replace(settings, adapter=adapter, rank=4)
    save = adapters.save

    def save_something_else(model: torch.nn.Module, settings: Settings) -> None:
        with torch.no_grad():
            trained = (n for n, p in model.named_parameters() if p.requires_grad)
            parameter = model.get_parameter(next(n for n in trained if "head" not in n))
            kept = parameter.clone()
            parameter.mul_(-3.0)
            save(model, settings)
            parameter.copy_(kept)

    monkeypatch.setattr(adapters, "save", save_something_else)
    with pytest.raises(run.ReloadError, match="must predict as the trained model does"):
        run.fine_tune(settings)


def _interrupt_after(batches: int) -> Callable[..., Any]:
    predict_batch, count = training.predict_batch, iter(range(batches))

    def stop(*args: Any) -> Any:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return predict_batch(*args)

    return stop


@pytest.mark.parametrize("batches", [11, 15], ids=["training", "evaluation"])
def test_an_interrupted_run_leaves_the_last_complete_adapter(settings, monkeypatch, batches):
    # Seven batches and one of evaluation are an epoch; the second is cut short.
    monkeypatch.setattr(training, "predict_batch", _interrupt_after(batches))
    with pytest.raises(run.Interrupted, match=r"adapter.safetensors holds the adapter of epoch 1"):
        run.fine_tune(replace(settings, epochs=3))
    monkeypatch.undo()
    left = load_file(settings.adapter_file)
    assert [p.name for p in settings.out.iterdir()] == [settings.adapter_file.name]
    base = run.fresh_model(run.read_tsv(settings.train_file, settings.eval_file), settings)
    adapters.load(base, settings)
    # The same adapter as the first of three epochs writes.
    saved: list[dict[str, torch.Tensor]] = []
    save = adapters.save

    def keep(model: torch.nn.Module, settings: Settings) -> None:
        save(model, settings)
        saved.append(load_file(settings.adapter_file))

    monkeypatch.setattr(adapters, "save", keep)
    run.fine_tune(replace(settings, epochs=3))
    assert saved[0].keys() == left.keys()
    assert all(torch.equal(saved[0][name], tensor) for name, tensor in left.items())
    assert not torch.equal(saved[1]["head.weight"], left["head.weight"])


def test_an_interruption_in_the_first_epoch_says_that_nothing_was_saved(settings, monkeypatch):
    monkeypatch.setattr(training, "predict_batch", _interrupt_after(3))
    with pytest.raises(run.Interrupted, match="nothing was saved"):
        run.fine_tune(settings)
    assert not settings.adapter_file.exists()


def test_a_diverging_run_is_an_error(settings):
    with pytest.raises(FloatingPointError, match="smaller --lr"):
        run.fine_tune(replace(settings, lr=1e30))


def test_settings_refuse_what_cannot_run(settings):
    with pytest.raises(ValueError, match="'nonsense'"):
        replace(settings, adapter="nonsense")
    with pytest.raises(ValueError, match=r"tau .* 'lora'"):
        replace(settings, adapter="lora", tau=0.5)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        replace(settings, epochs=0)


def test_batches_cover_every_row_once_and_group_lengths(settings):
    lengths = torch.randint(3, 30, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    inputs = {"input_ids": [[1] * length for length in lengths]}
    data = training.Encoded(None, inputs, torch.zeros(500))
    batches = training.shuffled(data, 8, torch.Generator().manual_seed(0))
    assert sorted(row for rows in batches for row in rows) == list(range(500))
    padded = sum(len(rows) * max(map(data.length, rows)) for rows in batches)
    assert padded < 1.15 * sum(lengths)


def test_a_single_output_is_scored_as_a_regression():
    target = torch.tensor([0.0, 1.0, 2.0]).double().numpy()
    assert scores(2 * target[:, None] - 1, target) == pytest.approx({"pearson": 1, "spearman": 1})


def test_the_table_shows_one_row_a_run(settings):
    results = [run.fine_tune(replace(settings, adapter=name)) for name in ("none", "qr")]
    lines = report.table(results).splitlines()
    assert [line.split("|")[1].strip() for line in lines[:4]] == [
        "adapter",
        "-" * 9,
        "head only",
        "QR-LoRA",
    ]
    assert len({len(line) for line in lines[:4]}) == 1
    assert f"{results[1]['trained']:,}" in lines[3]


@pytest.mark.slow
def test_the_command_line_runs_an_adapter_and_draws_the_picture(settings, capsys):
    out = settings.out
    status = finetune.main(
        f"--adapter qr --data {settings.train_file} --eval-data {settings.eval_file} "
        f"--model {settings.model} --epochs 1 --out {out} --quiet".split()
    )
    assert status == 0
    assert "| QR-LoRA |" in capsys.readouterr().out
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "table.md").read_text().startswith("| adapter |")
    assert not list(out.rglob("*.tmp"))


def test_a_wrong_command_line_is_a_plain_error(tmp_path, capsys):
    table = tmp_path / "bad.tsv"
    table.write_text("text\tlabel\n")
    assert finetune.main(["--data", str(table), "--out", str(tmp_path)]) == 2
    assert "got no rows" in capsys.readouterr().err
    assert finetune.main(["--data", str(table), "--task", "rte"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_lora_without_peft_is_left_out_of_all_and_refused_by_name(monkeypatch, capsys):
    monkeypatch.setattr(finetune.importlib.util, "find_spec", lambda name: None)
    assert "lora" not in finetune.chosen(finetune.parse(["--demo"]))
    assert "left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="pip install peft"):
        finetune.chosen(finetune.parse(["--adapter", "lora"]))


def test_peak_memory_sees_a_large_tensor():
    before = peak_memory()
    assert before is not None
    torch.ones(before + 2**26, dtype=torch.uint8).max()
    peak = peak_memory()
    assert peak is not None
    assert peak > before + 2**26
