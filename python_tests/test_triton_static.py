"""What the Triton launchers launch, compiled for absent chips: it fits and never spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Every row of the tile tables, compiled by the report's own script outside the interpreter."""
    out = tmp_path_factory.mktemp("static") / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "bench" / "static_report.py"), "--json", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded: list[Row] = json.loads(out.read_text())
    return loaded


def test_every_kernel_is_compiled_for_every_chip(rows: list[Row]) -> None:
    names = {
        "project_kernel",
        "finish_kernel",
        "two_phase_kernel",
        "sum_parts_kernel",
        "kron_fwd_kernel",
        "kron_bwd_kernel",
    }
    for chip in ("A100", "RTX 4090", "H200", "B200"):
        assert {row["kernel"] for row in rows if row["chip"] == chip} == names


def test_no_register_spills(rows: list[Row]) -> None:
    assert [row for row in rows if row["stack"]] == []


def test_shared_memory_within_each_chip(rows: list[Row]) -> None:
    """99 KiB a block on consumer chips, 163 on A100, 227 on Hopper and Blackwell."""
    assert [row for row in rows if row["shared"] > row["shared_limit"]] == []
    assert all(row["blocks"] >= 1 for row in rows)


def test_hopper_multiplies_by_wgmma_and_moves_by_tma(rows: list[Row]) -> None:
    big = [row for row in rows if row["chip"] == "H200" and " 8192×" in row["case"]]
    assert len(big) > 20
    for row in big:
        if row["kernel"] in ("finish_kernel", "sum_parts_kernel"):
            continue
        assert row["wgmma"] > 0, row
        # Q with rows off 16 bytes is the one operand that goes through pointers.
        if "unaligned" not in row["case"]:
            assert row["tma_loads"] > 0, row


def test_blackwell_multiplies_by_tcgen05(rows: list[Row]) -> None:
    big = [row for row in rows if row["chip"] == "B200" and row["kernel"] == "two_phase_kernel"]
    assert any(row["tcgen05"] > 0 and row["tma_loads"] > 0 for row in big)


def test_float32_never_becomes_tf32(rows: list[Row]) -> None:
    """The interpreter knows nothing of TF32; the compiled code must hold no tensor-core product."""
    plain = [row for row in rows if "float32" in row["case"]]
    assert len(plain) > 5
    assert all(row["wgmma"] == row["mma"] == 0 for row in plain)
