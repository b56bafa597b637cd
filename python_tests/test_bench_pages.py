"""The README's tables and docs/benchmarks.md say what was recorded, to a reader."""

from __future__ import annotations

import dataclasses

import pytest
from recorded_rows import recorded

from bench import machine, pages, rows
from bench.rows import RED, SKIPPED


def test_pages_agree_with_the_recorded_rows() -> None:
    assert pages.regenerate(check=True) == []


def test_a_number_changed_by_hand_is_noticed() -> None:
    found = rows.read_folder(pages.RESULTS)
    text = pages.README.read_text()
    assert found
    assert pages.readme(text, found) == text
    inside = text.index(pages.BEGIN) + len(pages.BEGIN)
    assert pages.readme(text[:inside] + "1.00" + text[inside:], found) == text
    with pytest.raises(ValueError, match="once each"):
        pages.readme(text.replace(pages.END, ""), found)


def test_the_readme_has_no_heading_without_a_table() -> None:
    alone = [recorded(1.0, 1.2, suite="pivots", metric="start", versions="torch 2", unit="ms")]
    assert pages.short(alone) == ""
    rival = dataclasses.replace(alone[0], variant="qrlora_kernels pivoted_qr", value=0.5)
    (sentence,) = pages.short([*alone, rival]).splitlines()
    assert "faster beyond noise in none of 1 recorded comparisons" in sentence
    layers = [
        recorded(2.0, 1.0, variant="frozen", adapter="", m=16, n=8, k=8, versions="torch 2"),
        recorded(3.0, 1.5, m=16, n=8, k=8, versions="torch 2"),
    ]
    lines = pages.short([*alone, rival, *layers]).splitlines()
    assert [line for line in lines if line.startswith("On ")] == [lines[0]]
    assert "| QR-LoRA in PyTorch | 3 ms (1.50×) |" in lines


def test_every_number_of_the_readme_has_a_unit() -> None:
    blocks = pages.short(rows.read_folder(pages.RESULTS)).split("\n\n")
    lines = [line for block in blocks if block[0] == "|" for line in block.splitlines()[2:]]
    cells = [cell.strip() for line in lines for cell in line.strip("|").split("|")[1:]]
    assert len(cells) > 50
    for cell in set(cells) - {"–"}:
        assert cell.split()[1] in ("ms", "s", "µs", "tokens/s"), cell


def test_a_chip_is_spoken_of_without_flags() -> None:
    chip = "Intel(R) Xeon(R) Processor avx2 avx512f amx_bf16, 1 threads"
    assert machine.spoken(chip) == "Intel Xeon Processor with AVX2, AVX-512, AMX, 1 thread"
    assert machine.spoken("NVIDIA H200") == "NVIDIA H200"


def test_recorded_rows_carry_their_machine_and_no_red_ratio() -> None:
    for row in rows.read_folder(pages.RESULTS):
        assert row.cpu
        assert row.threads
        assert row.commit
        assert "torch" in row.versions
        assert row.ratio is None or row.status not in (RED, SKIPPED)
