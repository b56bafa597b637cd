"""The benchmark itself: its gate bites, its rows are honest, its pages say what was recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import __main__ as command
from bench import compare, gate, machine, memory, pages, rows, table, timing, tune
from bench.competitors import STARTS, Layer, Start, starts_for, temporarily
from bench.competitors.lapack import geqp3rk
from bench.competitors.plain import expression, qr_eager
from bench.problem import LayerProblem, Runner
from bench.registry import Case, Effort
from bench.rows import RED, SKIPPED, Row
from bench.suites import decode, layer, start
from bench.suites import memory as suite_of_memory
from bench.suites.common import Options, results

CASE = Case(16, 32, 48, 4, "fp32")
BRIEF = Effort(seconds=0.02, min_rounds=2, max_rounds=2)
EQUAL = ("eager", "wrong", "qrlora_kernels")


def options(**changes: Any) -> Options:
    return dataclasses.replace(Options(effort=BRIEF, adapters=("qr",), variants=EQUAL), **changes)


def wrong(change: Callable[[Tensor], Tensor]) -> Layer:
    """A kernel of QR-LoRA whose update is not the one asked for."""

    def kernel(
        x: Tensor, weight: Tensor, bias: Tensor, q: Tensor, r: Tensor, lam: Tensor
    ) -> Tensor:
        return F.linear(x, weight, bias) + change(F.linear(F.linear(x, r) * lam, q))

    return Layer("wrong", "qr", lambda problem: expression("qr", kernel, problem))


WRONG = {
    "one percent too large": lambda update: 1.01 * update,
    "a token left out": lambda update: torch.cat([update[:-1], 0 * update[-1:]]),
    "one element off": lambda update: update + F.pad(torch.ones(1, 1), (0, 31, 0, 15)) * 0.01,
    "not finite": lambda update: update / 0,
    "no gradient": lambda update: update.detach() + 0 * update,
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("suite", [layer, decode], ids=["layer", "decode"])
def test_a_wrong_kernel_turns_red_and_loses_its_ratios(name: str, suite: Any) -> None:
    with temporarily(wrong(WRONG[name])):
        found = suite.run(CASE, options())
    red = [row for row in found if row.variant == "wrong"]
    assert red
    assert all(row.status == RED and row.ratio is None and row.note for row in red)
    shown = next(line for line in table.text(found).splitlines() if " wrong " in line)
    assert "RED" in shown
    assert "x  " not in shown
    others = [row for row in found if row.variant in ("eager", "qrlora_kernels")]
    assert others
    assert all(row.status == rows.OK and row.ratio for row in others)


def test_a_right_kernel_under_another_name_stays_green() -> None:
    with temporarily(wrong(lambda update: update)):
        found = layer.run(CASE, options(gate_only=True))
    assert {row.status for row in found} == {rows.OK}


def test_the_formed_product_is_gated_against_the_same_numbers_and_keeps_more() -> None:
    ours = options(adapters=("ohora",), variants=("r-kron", "qrlora_kernels"))
    assert {row.status for row in layer.run(CASE, ours)} == {rows.OK}
    saved = {
        row.variant: row.value
        for row in suite_of_memory.run(CASE, ours)
        if row.metric == "saved" and row.adapter
    }
    assert saved["r-kron"] > saved["qrlora_kernels"]
    left_out = [row for row in decode.run(CASE, ours) if row.variant == "r-kron"]
    assert [row.status for row in left_out] == [SKIPPED]


def test_a_start_without_greedy_pivots_turns_red() -> None:
    def unpivoted(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        q, r = torch.linalg.qr(weight)
        return q[:, :rank], r[:rank], torch.arange(rank)

    STARTS.append(Start("unpivoted", "qr", unpivoted))
    try:
        found = start.run(Case(0, 48, 32, 6, "fp32"), options(variants=("unpivoted", "pivoted_qr")))
    finally:
        STARTS.pop()
    by_name = {row.variant: row for row in found}
    assert by_name["unpivoted"].status == RED
    assert by_name["unpivoted"].ratio is None
    assert by_name["qrlora_kernels pivoted_qr"].status == rows.OK


def test_gate_allows_a_multiple_of_the_plain_error_only() -> None:
    exact = torch.randn(64, 64, dtype=torch.float64)
    noise = torch.randn(64, 64, dtype=torch.float64)

    def verdict(plain: float, got: float) -> gate.Verdict:
        return gate.judge({"y": exact + got * noise}, {"y": exact + plain * noise}, {"y": exact})

    assert verdict(1e-3, 1.9e-3).ok
    assert not verdict(1e-3, 2.2e-3).ok
    assert not gate.judge({}, {"y": exact}, {"y": exact}).ok
    assert not gate.judge({"y": exact[:1]}, {"y": exact}, {"y": exact}).ok


def test_what_is_not_installed_is_skipped_by_name() -> None:
    missing = Layer("absent", "qr", lambda problem: Runner(F.relu), needs=("no_such_package",))
    with temporarily(missing):
        (row,) = [r for r in layer.run(CASE, options(variants=("absent",))) if r.adapter]
    assert row.status == SKIPPED
    assert row.note == "no_such_package not installed"
    assert row.value is None


def test_every_start_runs_or_says_why_not() -> None:
    case = Case(0, 40, 32, 4, "fp32")
    found = start.run(case, options(variants=(), gate_only=True))
    assert {row.variant for row in found} == {s.name for s in starts_for()}
    assert not [row for row in found if row.status == RED]


def test_truncated_lapack_gives_the_pivots_of_the_whole_one() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    weight = torch.randn(50, 70, dtype=torch.float64).numpy()
    before = weight.copy()
    q, r, pivots = geqp3rk(weight, 12)
    assert (weight == before).all()
    assert pivots.tolist() == linalg.qr(weight, pivoting=True, mode="r")[1][:12].tolist()
    residual = torch.from_numpy(weight - q @ r)
    assert float(residual[:, pivots].abs().max()) < 1e-12


def test_saved_bytes_are_h_alone_for_qr_lora() -> None:
    problem = LayerProblem(Case(128, 64, 96, 4, "fp32"), "cpu")
    runner = expression("qr", qr_eager, problem)
    naive = memory.saved_bytes(lambda: runner.forward(problem.x), problem.x)
    assert naive == 128 * 4 * 4
    big = problem.x * 2
    assert memory.saved_bytes(lambda: big.exp() @ problem.weight.mT, big) >= big.nbytes


def test_variants_are_interleaved_in_two_runs() -> None:
    calls: list[str] = []

    def task(name: str) -> timing.Task:
        return {"forward": lambda _: calls.append(name), "backward": lambda _: None}

    found = timing.measure({"a": task("a"), "b": task("b")}, Effort(0.01, 6, 6), "cpu")
    turns = "".join(calls)
    assert {"forward", "backward", "both"} == set(found["a"])
    assert "ab" in turns.lstrip("a")
    assert "ba" in turns.lstrip("a")
    one = found["a"]["both"]
    assert one.q20 <= one.value <= one.q80


def test_a_slow_machine_slows_no_single_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other round takes three times as long; "a" has a bad moment in all that are quick."""
    costs = {"a": 1e-3, "b": 2e-3, "c": 3e-3, "d": 4e-3}
    machine = {"slowness": 1.0}

    def rounds(names: list[str], effort: Effort) -> Iterator[tuple[float, list[str]]]:
        for number in range(effort.max_rounds):
            machine["slowness"] = 3.0 if number % 2 else 1.0
            yield number / effort.max_rounds, names

    class Clock(timing.WallClock):
        def sample(self, task: timing.Task, _: Any) -> list[float]:
            name, slowness = task["forward"](None), machine["slowness"]
            return [costs[name] * (2.0 if name == "a" and slowness == 1.0 else slowness)]

    def run(names: str) -> dict[str, timing.Timing]:
        tasks: dict[str, timing.Task] = {n: {"forward": lambda _, n=n: n} for n in names}
        found = timing.measure(tasks, Effort(1.0, 4, 8), "cpu", Clock("cpu"))
        return {name: one["forward"] for name, one in found.items()}

    monkeypatch.setattr(timing, "_rounds", rounds)
    found = run("abcd")
    for name in "bcd":
        assert found[name].value / found["b"].value == pytest.approx(costs[name] / costs["b"])
        assert found[name].q80 == pytest.approx(found[name].q20)
    assert found["a"].q80 == pytest.approx(2 * found["a"].q20)
    two = run("bc")["b"]
    assert two.q80 == pytest.approx(3 * two.q20)  # which of two was slow, nobody can tell


def test_both_is_forward_and_backward_of_the_same_call() -> None:
    found = layer.run(CASE, options())
    at = {(row.variant, row.metric): row.value for row in found}
    for name in ("frozen", "eager", "qrlora_kernels"):
        assert at[name, "both"] >= max(at[name, "forward"], at[name, "backward"])
    assert {row.ratio for row in found if row.variant == "frozen"} == {1.0}


def test_results_are_read_back_as_written(tmp_path: Path) -> None:
    found = layer.run(CASE, options())
    rows.write(found, tmp_path / "a.csv")
    for path in (tmp_path / "a.csv", tmp_path / "a.json"):
        again = rows.read(path)
        assert [r.key() for r in again] == [r.key() for r in found]
        assert [r.value for r in again] == pytest.approx([r.value for r in found], rel=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")

    def fail(out: Any) -> None:
        out.write("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        rows.replace_file(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_rows_of_another_benchmark_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("speed\n1\n")
    with pytest.raises(ValueError, match="other columns"):
        rows.read(path)


def _recorded(value: float, ratio: float | None, **changes: Any) -> Row:
    made = Row("layer", "eager", "both", adapter="qr")
    numbers = {"value": value, "first": value, "second": value, "ratio": ratio}
    spread = {"q20": 0.99 * value, "q80": 1.01 * value}
    return dataclasses.replace(made, **{**numbers, **spread, **changes})


@pytest.mark.parametrize(
    ("new", "status"),
    [
        (_recorded(1.0, 1.2), 0),
        (_recorded(2.0, 1.2), 0),  # a slower machine: the floor is slower too
        (_recorded(1.0, 1.25), 0),  # within noise
        (_recorded(1.0, 1.0), 0),  # faster
        (_recorded(1.0, 1.5), 1),
        (_recorded(1.0, 1.5, first=1.0, second=2.0), 0),  # its own two runs disagree as much
        (_recorded(1.0, None, status=RED), 1),
        (_recorded(1.0, 1.2, metric="forward"), 1),  # the old measurement is gone
    ],
)
def test_compare_fails_on_what_is_worse_beyond_noise(new: Row, status: int, tmp_path: Path) -> None:
    rows.write([_recorded(1.0, 1.2)], tmp_path / "old.csv")
    rows.write([new], tmp_path / "new.csv")
    text, found = compare.report(tmp_path / "old.csv", tmp_path / "new.csv")
    assert found == status, text
    assert command.main(["compare", str(tmp_path / "old.csv"), str(tmp_path / "new.csv")]) == status


def test_pages_agree_with_the_recorded_rows() -> None:
    assert pages.regenerate(check=True) == []


def test_a_number_changed_by_hand_is_noticed() -> None:
    recorded = rows.read_folder(pages.RESULTS)
    text = pages.README.read_text()
    assert recorded
    assert pages.readme(text, recorded) == text
    inside = text.index(pages.BEGIN) + len(pages.BEGIN)
    assert pages.readme(text[:inside] + "1.00" + text[inside:], recorded) == text
    with pytest.raises(ValueError, match="once each"):
        pages.readme(text.replace(pages.END, ""), recorded)


def test_the_readme_has_no_heading_without_a_table() -> None:
    alone = [_recorded(1.0, 1.2, suite="pivots", metric="start", versions="torch 2", unit="ms")]
    assert pages.short(alone) == ""
    rival = dataclasses.replace(alone[0], variant="qrlora_kernels pivoted_qr", value=0.5)
    (sentence,) = pages.short([*alone, rival]).splitlines()
    assert "faster beyond noise in none of 1 recorded comparisons" in sentence
    layers = [
        _recorded(2.0, 1.0, variant="frozen", adapter="", m=16, n=8, k=8, versions="torch 2"),
        _recorded(3.0, 1.5, m=16, n=8, k=8, versions="torch 2"),
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


def test_gate_only_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--gate-only", "--device", "cpu", "--out", str(tmp_path)]
    which = ["--suites", "layer,decode", "--variants", "qrlora_kernels,eager,addmm"]
    assert command.main([*chosen, *which]) == 0
    shown = capsys.readouterr().out
    assert "green" in shown
    assert len(list(tmp_path.glob("*.csv"))) == 2
    with temporarily(wrong(lambda update: 2 * update)):
        assert command.main([*chosen, "--suites", "layer", "--variants", "wrong"]) == 1
    assert "RED: layer qr wrong" in capsys.readouterr().out


def test_the_contests_for_a_gpu_are_of_both_steps() -> None:
    found = tune.problems_of("qr_linear", 16, 16, 2, torch.device("cpu"), tokens=(4, 1))
    assert [(p.m, p.step) for p in found] == [(4, "fwd"), (4, "bwd"), (1, "fwd"), (1, "bwd")]


def test_command_line_names_bad_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--suites", "layers"])
    assert "'layers'" in capsys.readouterr().err
    assert command.main(["--list", "--cases", "no such case"]) == 2


def test_the_interface_keeps_each_variant_of_the_gate_separate() -> None:
    """Two builds from one problem share nothing that training could change."""
    problem = LayerProblem(CASE, "cpu")
    first, second = (expression("qr", qr_eager, problem) for _ in range(2))
    with torch.no_grad():
        first.trainables["lam"].zero_()
    assert not torch.equal(results(first, problem)["y"], results(second, problem)["y"])


def test_a_case_that_fails_is_named_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(case: Case, chosen: Options) -> list[Row]:
        if case.dtype == "bf16":
            raise RuntimeError("out of memory")
        return layer.run(case, chosen)

    monkeypatch.setitem(command.RUN, "layer", run)
    chosen = ["--gate-only", "--device", "cpu", "--suites", "layer", "--variants", "eager"]
    assert command.main([*chosen, "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "out of memory" in shown
    assert "FAILED: layer: M=32 128x128 r=16 bf16" in shown
    assert "fp16" in shown
