"""The table of adapters through PEFT: written from its rows alone, in PEFT's columns."""

from __future__ import annotations

import json

import pytest

from bench import peft_mixed, peft_table


def result(adapter: str, seed: int, accuracy: float) -> dict:
    return {
        "settings": {
            "adapter": adapter, "seed": seed, "task": "movies", "precision": "fp32", "epochs": 2,
        },
        "scores": [{"accuracy": 0.5, "f1": 0.5}, {"accuracy": accuracy, "f1": 0.5}],
        "trained": 1234,
        "head": 770,
        "rows": [200, 100],
        "seconds_to_start": 1.0,
        "seconds_an_epoch": [2.0, 3.0 + seed],
        "adapter_bytes": 4321,
        "peak_memory": 3 * 2**20,
        "steps": 10,
        "train_loss": 0.25,
        "versions": {"machine": "a CPU, 2 threads", "torch": "2.13"},
    }  # fmt: skip


def test_a_row_says_what_its_runs_say(tmp_path):
    runs = [result("lora", 0, 0.7), result("lora", 1, 0.8), result("qr_peft", 0, 0.75)]
    text = peft_table.table(runs)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[:4]]
    assert rows[0] == list(peft_table.HEADER)
    assert rows[2] == [
        "LoRA (PEFT)", "LORA", "6.5", "5.5", "0.550", "0.750 ± 0.071", "0.250", "3 MiB", "1,234",
        "4,321 B",
    ]  # fmt: skip
    assert rows[3][:2] == ["QR-LoRA through PEFT", "QK_QRLORA"]
    assert "a CPU, 2 threads" in text
    page = tmp_path / "page.md"
    page.write_text(f"before {peft_table.BEGIN} old {peft_table.END} after")
    peft_table.write(page, runs)
    assert page.read_text() == (f"before {peft_table.BEGIN}\n{text}\n{peft_table.END} after")
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must hold"):
        peft_table.write(page, runs)


def test_the_page_holds_the_recorded_rows():
    results = peft_table.read(peft_table.RESULTS)
    assert peft_table.table(results) in peft_table.PAGE.read_text(encoding="utf-8")
    assert {r["settings"]["adapter"] for r in results} == set(peft_table.METHODS)


def test_the_page_holds_the_recorded_mixed_batches():
    results = json.loads(peft_mixed.RESULTS.read_text(encoding="utf-8"))
    assert peft_mixed.table(results) in peft_table.PAGE.read_text(encoding="utf-8")
    assert set(results["rows"]) == set(peft_mixed.CONFIGS)
