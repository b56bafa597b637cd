"""The bench of many adapters: each part on a tiny encoder, its gates, its tables and picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import finetuning.model
import pytest
from finetuning import corpora
from finetuning.corpora import MEMBER, TASKS
from tiny_archive import write_archive
from tiny_encoder import WORDS, write_model

from bench.many_adapters import __main__ as command
from bench.many_adapters import page, serve, steps
from bench.many_adapters.sizes import QUICK


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> None:
    """A tiny model for the packaged one, and its sentences for those of the movie reviews."""
    folder = str(write_model(tmp_path))
    monkeypatch.setattr(finetuning.model, "model_folder", lambda name: folder)
    lines = "".join(
        f"{i}\t{1.5 if i % 2 else -1.5}\t{WORDS[i % 10]} {WORDS[i // 10 % 10]} {WORDS[i // 100]}\n"
        for i in range(300)
    )
    name = MEMBER.format(corpus=TASKS[steps.TASK].corpus)
    archive = write_archive(tmp_path / "a.zip", {name: lines})
    monkeypatch.setattr(corpora, "download", lambda: archive)
    monkeypatch.setattr(serve, "FIRST_WORD", 0)
    monkeypatch.setattr(serve, "WORDS", len(WORDS))
    monkeypatch.setattr(command, "QUICK_RESULTS", tmp_path / "quick.json")


def test_every_part_runs_and_its_numbers_agree(tiny, capsys):
    assert command.main(["--quick"]) == 0
    results = command.read(command.QUICK_RESULTS)
    assert list(results) == list(command.PARTS)
    rows = results["serve"]["rows"]
    assert [row["resident"] for row in rows] == 2 * list(QUICK.resident)
    assert [row["bytes"] for row in rows] == [4 * row["numbers"] * row["resident"] for row in rows]
    # LoRA of rank 8 over four layers of 32 x 32.
    assert rows[-1]["lora_bytes"] == rows[-1]["resident"] * 4 * 4 * 8 * (32 + 32)
    assert results["train"]["state_bytes"] == 12 * rows[-1]["numbers"]
    assert capsys.readouterr().out.strip() == page.text(results)


def test_one_part_leaves_the_results_of_the_others(tiny):
    command.QUICK_RESULTS.write_text(json.dumps({"train": made()["train"]}))
    assert command.main(["--quick", "--part", "examples"]) == 0
    results = command.read(command.QUICK_RESULTS)
    assert results["train"] == made()["train"]
    rows = results["examples"]["rows"]
    assert [row["adapter"].split(",")[0] for row in rows] == ["QR-LoRA", "LoRA-XS", "OHoRA"]
    assert all(row["difference"] <= command.LIMIT for row in rows)


def test_numbers_that_differ_are_not_written(tiny, monkeypatch, capsys):
    for wrong in (1e-3, float("nan")):
        monkeypatch.setitem(command.PARTS, "examples", lambda sizes, wrong=wrong: _examples(wrong))
        assert command.main(["--quick", "--part", "examples"]) == 1
        assert command.read(command.QUICK_RESULTS) == {}
        assert "examples" in capsys.readouterr().err


def test_a_row_with_another_adapters_numbers_is_noticed(tiny, monkeypatch):
    bank_put = serve.put

    def put_another(model: Any, state: dict[str, Any]) -> None:
        bank_put(model, {name: 2.0 * tensor for name, tensor in state.items()})

    monkeypatch.setattr(serve, "put", put_another)
    assert len(command.differences("serve", serve.serve(QUICK))) == 2 * len(QUICK.resident)


def _examples(difference: float) -> dict[str, Any]:
    row = {"ratio": 1.04, "each_ms": 104.0, "plain_ms": 100.0, "difference": difference}
    return {"rows": [{"adapter": "QR-LoRA", **row}]}


def made() -> dict[str, Any]:
    """Results as the parts give them."""
    about = {
        "sizes": {"tokens": 64, "short": 16, "rounds": 15, "calls": 200},
        "machine": {"cpu": "a CPU", "threads": "2", "versions": "python 3.12; torch 2.13.0"},
    }
    times = {"p50_ms": 61.0, "p99_ms": 70.0, "own_p50_ms": 60.0, "own_p99_ms": 69.0}
    row = {
        "adapter": "QR-LoRA, r = 8", "numbers": 96, "resident": 100_000, "bytes": 38_400_000,
        "lora_bytes": 29_491_200_000, "ratio": 1.02, "add_us": 71.2, "replace_us": 60.0,
        "load_seconds": 1.5, "difference": 0.0, **times,
    }  # fmt: skip
    step = {"together_ms": 329.0, "one_ms": 311.0, "one_by_one_ms": 1410.0, "ratio": 1.06}
    train = {
        "numbers": 1764, "state_bytes": 21_168, "lora_state_bytes": 884_736, "tenants": 64,
        "sentences": 32, "held": 100, "steps_of_each": 24, "before": 0.41, "together": 0.62513,
        "alone": 0.62507, "largest_score_difference": 0.01, "difference": 4e-5,
        "steps": [{"tenants": 1, **step}, {"tenants": 64, **step}],
    }  # fmt: skip
    parts = {"serve": {"rows": [row]}, "train": train, "examples": _examples(3e-7)}
    return {name: {**part, **about} for name, part in parts.items()}


def test_the_tables_say_what_the_results_say():
    lines = page.text(made()).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    assert rows[2] == [
        "QR-LoRA, r = 8", "100,000", "37 MiB", "27.5 GiB", "1.02", "61 ms (60)", "70 ms (69)",
        "71 µs", "60 µs", "1.50 s", "0e+00",
    ]  # fmt: skip
    assert rows[6] == ["64", "329 ms", "311 ms", "1410 ms", "1.06"]
    assert rows[-1] == ["QR-LoRA", "100 ms", "104 ms", "1.04", "3e-07"]
    text = " ".join(lines)
    assert "**0.6251** in one bank, **0.6251** by runs" in text
    assert "21 KiB (numbers and two moments), LoRA r = 8 864 KiB" in text
    assert "64 sentences of movie reviews" in text
    assert text.count("a CPU, 2 threads, torch 2.13.0") == 3


def test_the_page_gets_tables_and_picture(tmp_path):
    written = tmp_path / "page.md"
    written.write_text(f"before {page.BEGIN} old {page.END} after")
    page.write(written, made())
    text = page.text(made())
    assert written.read_text() == f"before {page.BEGIN}\n{text}\n{page.END} after"
    picture = (tmp_path / page.PICTURE).read_text()
    assert page.PICTURE in text
    for words in ("in one bank", "one by one", "LoRA, r = 8", "bytes of all"):
        assert words in picture
    page.write(written, made())
    assert (tmp_path / page.PICTURE).read_text() == picture
    page.write(written, {})
    assert page.NOTHING in written.read_text()


def test_the_page_holds_the_recorded_results():
    results = command.read(command.RESULTS)
    assert page.text(results) in page.PAGE.read_text(encoding="utf-8")
    assert not results or (Path(page.PAGE.parent) / page.PICTURE).is_file()
