"""The benchmark's sweeps, overhead and memory, and its rule that a loss needs a reason."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import __main__ as command
from bench import fresh, losses, memory, pages, rows, sweeps, timing
from bench.competitors import STARTS, Layer, Start, temporarily
from bench.competitors.plain import expression
from bench.problem import LayerProblem, Runner
from bench.registry import SUITES, SWEEPS, Case, Effort, GridCase, PivotCase
from bench.rows import OK, RED, Row
from bench.suites import grid, overhead, pivots
from bench.suites.common import Options
from qrlora_kernels.linalg import pivoted_qr

BRIEF = Effort(seconds=0.02, min_rounds=2, max_rounds=2)
GRID = GridCase(5, 32, 32, "fp32", (2, 4))


def options(**changes: Any) -> Options:
    return dataclasses.replace(Options(effort=BRIEF), **changes)


def recorded(variant: str, value: float, **changes: Any) -> Row:
    spread = {"q20": value, "q80": value, "first": value, "second": value}
    row = Row("layer", variant, "both", adapter="qr", n=8, k=8, r=4, value=value, **spread)
    return dataclasses.replace(row, **changes)


# --- losses


def test_every_recorded_loss_has_a_reason_in_the_notes() -> None:
    assert losses.unexplained(rows.read_folder(pages.RESULTS)) == []


def test_a_new_loss_without_a_reason_is_noticed() -> None:
    lost = [recorded("qrlora_kernels", 2.0), recorded("addmm", 1.0)]
    notes = "# Notes\n\n## Where an alternative is ahead\n\n### decode lora_xs\n\nslow walk\n"
    assert losses.unexplained(lost, notes) == ["layer qr"]
    assert losses.unexplained(lost, notes + "\n### layer qr\n\n") == ["layer qr"]  # an empty one
    assert losses.unexplained(lost, notes + "\n### layer qr\n\nbecause\n") == []
    elsewhere = notes + "\n## Another section\n\n### layer qr\n\nbecause\n"
    assert losses.unexplained(lost, elsewhere) == ["layer qr"]
    assert "#layer-qr" in losses.listed(lost)[0]
    assert "addmm by 50%" in losses.listed(lost)[1]


@pytest.mark.parametrize(
    "change",
    [{"r": 2}, {"adapter": "lora_xs"}, {"status": RED}, {"clock": "device"}, {"value": 1.96}],
    ids=str,
)
def test_only_the_same_work_is_a_rival(change: dict[str, Any]) -> None:
    assert losses.losses([recorded("qrlora_kernels", 2.0), recorded("addmm", 1.0)])
    other = dataclasses.replace(recorded("addmm", 1.0), **change)
    assert not losses.losses([recorded("qrlora_kernels", 2.0), other])


def test_another_machine_is_no_rival() -> None:
    """Nor the same one with other threads: each recorded in a file of its own."""
    ours = recorded("qrlora_kernels", 2.0, threads="1")
    assert losses.losses([ours, recorded("addmm", 1.0, threads="1")])
    assert not losses.losses([ours, recorded("addmm", 1.0, threads="2")])


def test_the_same_code_is_no_rival() -> None:
    ours = recorded("qrlora_kernels", 2.0, backend="composed")
    assert not losses.losses([ours, recorded("composed", 1.0, backend="composed")])
    assert losses.losses([ours, recorded("composed", 1.0, backend="cpu")])


# --- timing


def test_each_variant_follows_each_other_one() -> None:
    names = list("abcde")
    orders = [order for _, order in timing._rounds(names, Effort(1e9, 80, 80))]
    followed = Counter(pair for order in orders for pair in pairwise(order))
    assert set(followed) == {(a, b) for a in names for b in names if a != b}
    assert max(followed.values()) <= len(orders) // 2


def test_a_long_call_of_steady_time_sits_out() -> None:
    assert timing._known_well([[0.20, 0.1], [0.201, 0.101]], 1)
    assert not timing._known_well([[0.20]], 1)
    assert not timing._known_well([[0.20], [0.25], [0.20]], 1)
    assert not timing._known_well([[0.01], [0.01]], 1)  # a short one gives quantiles for little
    assert timing._known_well([[2.0]], 0)


# --- grid


def test_grid_measures_each_rank_over_one_frozen_layer() -> None:
    found = [row for row in grid.run(GRID, options()) if row.metric == "both"]
    ranks = {(row.adapter, row.variant): [] for row in found}  # type: ignore[var-annotated]
    for row in found:
        ranks[row.adapter, row.variant].append(row.r)
        assert row.status == OK
        assert row.ratio is not None
    assert ranks["", "frozen"] == [0]
    for variant in ("qrlora_kernels", "eager", "addmm", "composed"):
        assert ranks["qr", variant] == ranks["lora_xs", variant] == [2, 4]
        assert ranks["ohora", variant] == [4]
    assert sweeps.grid_table(found).count("QR-LoRA fp32 | 5 |") == 2


def test_grid_gives_a_wrong_kernel_no_ratio() -> None:
    def kernel(x: Tensor, weight: Tensor, bias: Tensor, q: Tensor, r: Tensor, lam: Tensor) -> Any:
        return F.linear(x, weight, bias) + 1.01 * F.linear(F.linear(x, r) * lam, q)

    wrong = Layer("addmm", "qr", lambda problem: expression("qr", kernel, problem))
    with temporarily(wrong):
        found = grid.run(GRID, options(adapters=("qr",)))
    red = [row for row in found if row.status == RED]
    assert {row.r for row in red} == {2, 4}
    assert all(row.variant == "addmm" and row.ratio is None for row in red)


def test_grid_table_names_what_is_behind() -> None:
    case = {"suite": "grid", "m": 16, "dtype": "bf16"}
    floor = recorded("frozen", 1.0, adapter="", r=0, ratio=1.0, **case)
    ours = recorded("qrlora_kernels", 2.0, ratio=2.0, **case)
    text = sweeps.grid_table([floor, ours, recorded("composed", 1.6, ratio=1.6, **case)])
    assert "| QR-LoRA bf16 | 16 | 4 | 2.00 / 1.60 (**1.25**) |" in text
    assert "in 0 of 1; behind it beyond noise in 1." in text


# --- pivots


def test_pivots_of_another_order_are_red() -> None:
    def swapped(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        found = pivoted_qr(weight, rank)
        order = torch.arange(rank).roll(1)
        return found.q[:, order], found.r[order], found.pivots[order]

    case = PivotCase(40, 40, (3, 40), "fp64")
    STARTS.append(Start("qrlora_kernels swapped", "qr", swapped))
    try:
        found = pivots.run(case, options(gate_only=True))
    finally:
        STARTS.pop()
    status = {(row.variant, row.r): row.status for row in found}
    assert status["qrlora_kernels swapped", 3] == status["qrlora_kernels swapped", 40] == RED
    for variant in ("qrlora_kernels pivoted_qr", "scipy geqp3", "LAPACK geqp3rk"):
        assert status[variant, 3] == status[variant, 40] == OK


def test_pivots_hold_one_whole_factorisation_against_every_rank() -> None:
    found = pivots.run(PivotCase(48, 48, (4, 48)), options())
    scipy = {row.r: row.value for row in found if row.variant == "scipy geqp3"}
    assert set(scipy) == {4, 48}
    assert scipy[4] == scipy[48]
    text = sweeps.pivots_table(found)
    assert "| 48×48 fp32 | 4 |" in text
    assert "| 48×48 fp32 | all |" in text


def test_a_list_in_one_call_is_held_against_a_loop() -> None:
    found = pivots.run(PivotCase(24, 32, (4,), count=3), options())
    assert {row.variant: row.ratio is not None for row in found} == {
        "one call each": True,
        "qrlora_kernels pivoted_qr, one call": True,
    }
    assert "3 of 24x32 r=4 fp32" in sweeps.pivots_table(
        [*found, *pivots.run(PivotCase(24, 24, (4,)), options())]
    )


# --- overhead


def test_overhead_is_what_a_call_adds() -> None:
    def slow(problem: LayerProblem) -> Runner:
        def forward(x: Tensor) -> Tensor:
            end = time.thread_time() + 2e-4
            while time.thread_time() < end:
                pass
            return F.linear(x, problem.weight, problem.bias)

        return Runner(forward)

    with temporarily(Layer("eager", "lora", slow)):
        found = overhead.run(Case(1, 8, 8, 2, "fp32"), options(adapters=("lora",)))
    took = {(row.variant, row.metric): row.value or 0.0 for row in found}
    for metric in ("no_grad", "grad"):
        assert took["eager", metric] - took["frozen", metric] > 190
    assert {row.unit for row in found} == {"µs"}


def test_overhead_table_subtracts_the_linear_layer() -> None:
    case = {"suite": "overhead", "unit": "µs", "clock": "thread"}
    made = [
        recorded(variant, value, adapter=adapter, metric=metric, **case)
        for variant, adapter, value in (("frozen", "", 3.0), ("qrlora_kernels", "qr", 14.5))
        for metric in ("no_grad", "grad")
    ]
    assert "**this package** | 11.5 | 11.5 |" in sweeps.overhead_table(made)


# --- memory

LINUX = Path("/proc/self/clear_refs").exists()


@pytest.mark.skipif(not LINUX, reason="resident pages are counted on Linux alone")
def test_peak_sees_memory_that_torch_did_not_allocate() -> None:
    size = 64 << 20
    peak = memory.peak_bytes(lambda: np.ones(size, np.uint8).nbytes, "cpu")
    assert peak is not None
    assert abs(peak - size) < 4 << 20
    again = memory.peak_bytes(lambda: torch.ones(size, dtype=torch.uint8).nbytes, "cpu")
    assert again is not None
    assert abs(again - size) < 4 << 20
    nothing = memory.peak_bytes(lambda: None, "cpu")
    assert nothing is not None
    assert nothing < 2 << 20


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="resident pages are counted on Linux alone")
def test_peak_of_a_step_in_its_own_process() -> None:
    case = Case(4096, 512, 512, 16, "fp32")
    frozen, eager = (fresh.peak("layer", key, case) for key in ("frozen", "qr eager"))
    assert frozen is not None
    assert eager is not None
    assert frozen > 2 * 4096 * 512 * 4 - (1 << 20)  # y and dx
    assert eager > frozen
    assert fresh.peak("layer", "no such layer", case) is None
    assert fresh.peak("layer", "frozen", case) is not None  # and the server is still there
    weight = Case(0, 256, 512, 16, "fp32")
    assert fresh.peak("start", "qrlora_kernels pivoted_qr", weight) is not None


# --- the command


def test_sweeps_run_when_named_or_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    def suites(*chosen: str) -> list[str]:
        assert command.main(["--list", "--device", "cpu", *chosen]) == 0
        lines = capsys.readouterr().out.splitlines()
        return list(dict.fromkeys(line.partition(":")[0] for line in lines))

    assert suites() == list(SUITES)
    assert suites("--full") == [*SUITES, *SWEEPS]
    assert suites("--suites", "grid") == ["grid"]


def test_gate_only_pass_of_the_sweeps(tmp_path: Path) -> None:
    chosen = ["--gate-only", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main([*chosen, "--suites", "grid,pivots,cpu,overhead"]) == 0
    assert len(list(tmp_path.glob("*.csv"))) == 4
