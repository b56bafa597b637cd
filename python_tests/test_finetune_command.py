"""The example's command line: which runs it makes, what it refuses, what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import finetune
import pytest
from finetuning import cells, data
from finetuning.methods import DEMO, METHODS, OPTIONS
from finetuning.settings import Settings
from tiny_encoder import make_settings, write_model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def settings(tmp_path, tiny_model) -> Settings:
    return make_settings(tmp_path, tiny_model)


def _cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str) -> list[Settings]:
    """The runs that a command line asks for, without running them."""
    split = data.Split((["a b", "c d"],), ["no", "yes"])
    monkeypatch.setattr(finetune, "load_data", lambda args: data.Data(split, split, ("no", "yes")))
    asked: list[Settings] = []

    def take(cells: Any, lines: Path, jobs: int) -> list[Any]:
        asked.extend(cells)
        return []

    monkeypatch.setattr(finetune, "run_cells", take)
    assert finetune.main([*line.split(), "--out", str(tmp_path)]) == 0
    return asked


def test_the_demo_is_five_methods_with_three_seeds_each(monkeypatch, tmp_path):
    asked = _cells(monkeypatch, tmp_path, "--demo")
    assert [(c.adapter, c.seed) for c in asked] == [(a, s) for a in DEMO for s in (0, 1, 2)]
    assert {(c.max_length, c.epochs) for c in asked} == {(64, 2)}
    assert len({c.out for c in asked}) == 15
    assert len({c.warmup_folder for c in asked}) == 1


def test_what_is_given_beside_the_demo_holds(monkeypatch, tmp_path):
    asked = _cells(monkeypatch, tmp_path, "--demo --seeds 4 4 --adapter qr --max-length 32")
    assert [(c.adapter, c.seed, c.max_length) for c in asked] == [("qr", 4, 32)]
    assert finetune.parse(["--demo", "--train-rows", "77"]).train_rows == 77


def test_an_option_goes_to_the_methods_that_take_it(monkeypatch, tmp_path):
    line = "--adapter qr lora_xs lora none --rank 5 --rank-rule energy --sigma out --alpha 3"
    options = {c.adapter: dict(c.options) for c in _cells(monkeypatch, tmp_path, line)}
    assert options == {
        "qr": {"rank": 5, "rank_rule": "energy"},
        "lora_xs": {"rank": 5, "sigma": "out", "alpha": 3.0},
        "lora": {"rank": 5, "alpha": 3.0},
        "none": {},
    }


def test_every_option_has_a_flag(monkeypatch, tmp_path):
    line = ["--adapter", *METHODS]
    for name, option in OPTIONS.items():
        flag = "--" + (option.flag or name.replace("_", "-"))
        value = {int: "1", float: "0.5"}.get(option.type, (option.choices or ("",))[-1])
        line += [flag] if option.type is bool else [flag, value]
    given = {n for c in _cells(monkeypatch, tmp_path, " ".join(line)) for n in c.options}
    assert given == set(OPTIONS)


def test_layers_warm_up_and_task_reach_the_runs(monkeypatch, tmp_path):
    line = "--layers last:4 --warmup-epochs 3 --task tweets --targets all-linear"
    (cell,) = _cells(monkeypatch, tmp_path, line)
    assert (cell.layers, cell.warmup_epochs, cell.task) == ("last:4", 3, "tweets")
    assert cell.targets == ("all-linear",)


def test_a_wrong_command_line_is_a_plain_error(tmp_path, capsys):
    table = tmp_path / "bad.tsv"
    table.write_text("text\tlabel\n")
    for line, message in (
        (f"--data {table}", "got no rows"),
        (f"--data {table} --task rte", "exclude each other"),
        (f"--eval-data {table}", "--eval-data needs --data"),
        ("--adapter lora none --tau 0.5", "tau is an option of qr, qr_peft, got ['lora', 'none']"),
        ("--layers first", "layers must be 'all' or as 'last:4', got 'first'"),
    ):
        (tmp_path / "good.tsv").write_text("text\tscore\na\t0.5\nb\t1\nc\t2\n")
        good = [] if "data" in line else ["--data", str(tmp_path / "good.tsv")]
        assert finetune.main([*line.split(), *good, "--out", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_peft_is_left_out_of_the_demo_and_refused_by_name(monkeypatch, capsys):
    monkeypatch.setattr(finetune.importlib.util, "find_spec", lambda name: None)
    for adapters in (["all"], list(DEMO)):
        left = finetune.chosen(adapters)
        assert all(METHODS[name].provider != "peft" for name in left)
        assert {"qr", "lora_xs", "ohora", "none"} <= set(left)
        assert "left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"'lora' needs .* pip install peft"):
        finetune.chosen(["qr", "lora"])


@pytest.mark.slow
def test_the_command_line_runs_and_draws_the_picture(settings, capsys):
    out = settings.out
    line = (
        f"--adapter none qr --data {settings.train_file} --eval-data {settings.eval_file} "
        f"--seeds 0 1 --model {settings.model} --epochs 1 --warmup-epochs 1 --out {out} --quiet"
    )
    assert finetune.main(line.split()) == 0
    assert "| QR-LoRA " in capsys.readouterr().out
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "table.md").read_text().startswith("| method ")
    lines = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
    assert [(r["settings"]["adapter"], r["settings"]["seed"]) for r in lines] == [
        (adapter, seed) for adapter in ("none", "qr") for seed in (0, 1)
    ]
    assert len(list((out / "warmed").iterdir())) == 2
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
def test_a_run_that_fails_keeps_the_results_before_it(settings, capsys):
    line = (
        f"--adapter none lora_xs --data {settings.train_file} --eval-data {settings.eval_file} "
        f"--rank 99 --model {settings.model} --epochs 1 --out {settings.out} --quiet"
    )
    assert finetune.main(line.split()) == 1
    assert "| head only " in capsys.readouterr().out
    assert len((settings.out / "results.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_two_at_a_time_give_the_results_of_one_at_a_time_in_their_order(
    settings, capsys, monkeypatch
):
    """The bar and the table are seen; what the runs say lies in a log beside each."""
    # Runs share the cores by this variable, which other tests are not to have.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    line = (
        f"--adapter none qr --seeds 0 1 --data {settings.train_file} --eval-data "
        f"{settings.eval_file} --rank 4 --model {settings.model} --epochs 1 --precision fp32"
    ).split()
    scores = []
    for jobs in ("1", "2"):
        out = settings.out / jobs
        assert finetune.main([*line, "--jobs", jobs, "--out", str(out)]) == 0
        results = [json.loads(r) for r in (out / "results.jsonl").read_text().splitlines()]
        names = [(r["settings"]["adapter"], r["settings"]["seed"]) for r in results]
        assert names == [(adapter, seed) for adapter in ("none", "qr") for seed in (0, 1)]
        scores.append([r["scores"] for r in results])
    assert scores[0] == scores[1]
    assert "2 runs at a time." in capsys.readouterr().out
    assert len(list(out.rglob("*.log"))) == 4


@pytest.mark.slow
def test_a_failure_among_several_ends_them_with_its_words(settings, capsys):
    line = (
        f"--adapter none lora_xs --data {settings.train_file} --eval-data {settings.eval_file} "
        f"--rank 99 --model {settings.model} --epochs 1 --jobs 2 --out {settings.out}"
    )
    assert finetune.main(line.split()) == 1
    said = capsys.readouterr()
    assert "| head only " in said.out
    assert "rank must be at most" in said.err


def test_no_run_at_a_time_is_refused(settings, capsys):
    line = f"--jobs 0 --data {settings.train_file} --eval-data {settings.eval_file}"
    assert finetune.main([*line.split(), "--out", str(settings.out)]) == 2
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err


def test_a_run_that_is_killed_says_so(settings, monkeypatch, capsys):
    class Killed:
        exitcode = -9

        def __init__(self, **_: Any) -> None: ...

        def start(self) -> None: ...

        def join(self) -> None: ...

    monkeypatch.setattr(cells, "_context", lambda: type("Context", (), {"Process": Killed}))
    assert cells.run_alone(settings) == 1
    assert "killed by signal 9" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_says_to_its_log_that_it_diverged(settings, tmp_path, capfd):
    log = tmp_path / "logs" / "run.txt"
    assert cells.run_alone(replace(settings, lr=1e30), log) == cells.DIVERGED
    assert "try a smaller --lr" in log.read_text()
    assert capfd.readouterr() == ("", "")
