"""Rank rules, brackets, errors, interruption and memory of pivoted_qr."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from pivot_matrices import gaussian, lapack, matrices
from test_pivoted_qr import path  # noqa: F401  a fixture

from qrlora_kernels.linalg import (
    RANK_RULES,
    cpu_core,
    pivoted_qr,
    rank_from_diagonal,
    rank_profile,
    rebuild_pivoted_qr,
)

usefixtures = pytest.mark.usefixtures


@pytest.mark.parametrize("tau", [0.05, 0.5, 0.93])
@pytest.mark.parametrize("rule", RANK_RULES)
@pytest.mark.parametrize("name", ["gaussian", "heavy_tailed", "geometric_spectrum", "rank_100"])
def test_rules_against_the_whole_diagonal(
    name: str,
    rule: str,
    tau: float,
    path: str,  # noqa: F811
) -> None:
    weight = matrices(160 if path == "emulated CUDA" else 320)[name]  # an eighth of the work
    diagonal = lapack(weight)[1]
    expected = {
        "magnitude": int((diagonal > tau * diagonal[0]).sum()),
        "energy": int((diagonal.square().cumsum(0) < tau * diagonal.square().sum()).sum()) + 1,
        "abs_sum": int((diagonal.cumsum(0) < tau * diagonal.sum()).sum()) + 1,
    }[rule]
    found = pivoted_qr(weight, tau=tau, rank_rule=rule)
    assert found.rank == expected
    assert found.q.shape[1] == len(found.pivots) == len(found.diagonal) == expected
    assert pivoted_qr(weight, tau=tau, rank_rule=rule, max_rank=7).rank == min(expected, 7)
    if rule != "magnitude":
        rough = pivoted_qr(weight, tau=tau, rank_rule=rule, exact=False)
        assert rough.bracket is not None
        low, high = rough.bracket
        assert low <= expected <= high == rough.rank


@usefixtures("path")
def test_bracket_stops_before_the_end() -> None:
    weight = gaussian(400, 400)
    rough = pivoted_qr(weight, tau=0.3, rank_rule="energy", exact=False)
    assert rough.bracket is not None
    assert rough.rank < 200
    capped = pivoted_qr(weight, tau=0.9, rank_rule="abs_sum", exact=False, max_rank=20)
    assert capped.bracket == (20, 20)


def test_rank_rules_on_a_known_diagonal() -> None:
    diagonal = torch.tensor([4.0, 2.0, 1.0, 1.0])
    assert rank_from_diagonal(diagonal, 0.5, "magnitude") == 1  # strictly above
    assert rank_from_diagonal(diagonal, 0.5, "abs_sum") == 1
    assert rank_from_diagonal(diagonal, 0.75, "abs_sum") == 2
    assert rank_from_diagonal(diagonal, 16 / 22, "energy") == 1
    assert rank_from_diagonal(diagonal, 0.95, "energy") == 3


def test_rank_profile() -> None:
    weight = gaussian(90, 120)
    profile = rank_profile(weight, taus=[0.25, 0.75])
    assert len(profile.diagonal) == 90
    for rule, ranks in profile.ranks.items():
        expected = [pivoted_qr(weight, tau=t, rank_rule=rule).rank for t in (0.25, 0.75)]
        assert list(ranks) == expected


def test_a_profile_prints_as_a_short_table_and_keeps_its_numbers() -> None:
    """It was 6 KB of numbers."""
    profile = rank_profile(gaussian(40, 60).bfloat16())
    text = str(profile)
    assert text == repr(profile)
    assert len(text.splitlines()) == 12
    assert max(map(len, text.splitlines())) <= 100
    shown = [float(line.split()[0]) for line in text.splitlines()[3:]]
    assert shown == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert len(profile.taus) == len(profile.ranks["energy"]) == 99
    middle = profile.ranks["magnitude"][profile.taus.index(0.5)]
    kib = middle * (40 + 60) * 2 / 1024
    row = text.splitlines()[7].split()
    assert row[1:4] == [str(middle), f"{middle / 40:.0%}", f"{kib:.1f}"]
    assert "weight [40, 60] bfloat16, 4.7 KiB" in text


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 25])
def test_a_profile_of_other_thresholds_shows_them_or_nine_of_them(count: int) -> None:
    taus = [0.9 + 0.099 * i / count for i in range(count)]
    lines = str(rank_profile(gaussian(12, 8), taus)).splitlines()[3:]
    assert len({line.split()[0] for line in lines}) == len(lines) == min(count, 9)


def test_a_profile_without_thresholds_is_refused() -> None:
    with pytest.raises(ValueError, match="taus must hold at least one threshold"):
        rank_profile(gaussian(12, 8), [])


def test_a_profile_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    profile = rank_profile(gaussian(12, 8), [0.7, 0.2])
    figure = profile.plot()
    diagonal, ranks = figure.axes
    assert diagonal.lines[0].get_ydata()[0] == 1
    assert len(diagonal.lines[0].get_ydata()) == 8
    assert [line.get_label() for line in ranks.lines] == list(RANK_RULES)
    for line in ranks.lines:
        assert list(line.get_xdata()) == [0.2, 0.7]
        assert list(line.get_ydata()) == list(reversed(profile.ranks[line.get_label()]))
    pyplot.close(figure)

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plot\(\) needs matplotlib.*pip install matplotlib"):
        profile.plot()


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (ValueError, {"rank": 0}),
        (ValueError, {"rank": 41}),
        (TypeError, {"rank": 2.0}),
        (ValueError, {"tau": 0.0}),
        (ValueError, {"tau": 1.0}),
        (ValueError, {"tau": float("nan")}),
        (TypeError, {"tau": "0.5"}),
        (ValueError, {"rank": 3, "tau": 0.5}),
        (ValueError, {"max_rank": 0}),
        (ValueError, {"tau": 0.5, "rank_rule": "median"}),
        (ValueError, {"axis": 2}),
        (TypeError, {"out_dtype": torch.int32}),
    ],
    ids=str,
)
def test_bad_options(error: type[Exception], options: dict[str, object]) -> None:
    argument = "rank_rule" if "rank_rule" in options else next(iter(options))
    with pytest.raises(error, match=argument):
        pivoted_qr(gaussian(40, 50), **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("bad", ["zero", "nan", "inf", "ndim", "empty", "int", "meta", "list"])
@usefixtures("path")
def test_bad_matrix_is_named(bad: str) -> None:
    weight = gaussian(30, 20)
    if bad == "nan":
        weight[29, 19] = float("nan")
    if bad == "inf":
        weight[0, 3] = float("-inf")
    weight = {
        "zero": torch.zeros(30, 20),
        "ndim": torch.ones(4),
        "empty": torch.ones(0, 4),
        "int": torch.ones(4, 4, dtype=torch.int8),
        "meta": torch.ones(4, 4, device="meta"),
        "list": [1.0],
    }.get(bad, weight)
    with pytest.raises((ValueError, TypeError), match=r"weights\[1\]"):
        pivoted_qr([gaussian(8, 8), weight], rank=2)
    with pytest.raises((ValueError, TypeError), match="weights"):
        pivoted_qr(weight, rank=2)


def test_rank_beyond_one_matrix_of_the_list() -> None:
    with pytest.raises(ValueError, match=r"min\(N, K\) = 8 for weights\[1\]"):
        pivoted_qr([gaussian(20, 20), gaussian(8, 30)], rank=10)


@pytest.mark.parametrize(
    "pivots", [[0, 0], [0, 20], [-1], [], [[1]], [0.5], list(range(21))], ids=str
)
def test_rebuild_refuses_bad_pivots(pivots: list[object]) -> None:
    with pytest.raises(ValueError, match="pivots"):
        rebuild_pivoted_qr(gaussian(30, 20), torch.tensor(pivots))


@usefixtures("path")
def test_rebuild_refuses_dependent_pivots() -> None:
    weight = gaussian(30, 20)
    weight[:, 4] = 0
    with pytest.raises(ValueError, match="independent"):
        rebuild_pivoted_qr(weight, torch.tensor([1, 4]))


def test_empty_list() -> None:
    assert pivoted_qr([], rank=3) == []


def test_gil_is_released() -> None:
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.wait(0.002):
            ticks.append(time.perf_counter())

    other = threading.Thread(target=tick)
    weight = gaussian(700, 900)
    other.start()
    start = time.perf_counter()
    for _ in range(3):
        pivoted_qr(weight, rank=300)
    stop = time.perf_counter()
    done.set()
    other.join()
    assert cpu_core.CORE is not None
    assert sum(start < at < stop for at in ticks) >= 10


def test_control_c_stops_between_blocks() -> None:
    code = (
        "import signal, torch; from qrlora_kernels.linalg import pivoted_qr\n"
        # A shell starts its background jobs with SIGINT ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "w = torch.randn(2000, 2000)\n"
        "print('ready', flush=True)\n"
        "try:\n    pivoted_qr([w] * 200)\n"
        "except KeyboardInterrupt:\n    print('stopped', flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(1.0)
    child.send_signal(signal.SIGINT)
    try:
        out, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert out == "stopped\n"


def test_progress_counts_to_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    pivoted_qr([gaussian(20, 20)] * 3, rank=2, progress=True)
    assert "6/6" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_of_a_wide_half_precision_weight() -> None:
    code = (
        "import resource, torch; from qrlora_kernels.linalg import pivoted_qr\n"
        "w = torch.randn(4096, 14336, dtype=torch.float32).bfloat16()\n"
        "pivoted_qr(w[:256, :256], rank=8)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "ballast = torch.ones(max(peak() * 1024 // 8, 1), dtype=torch.float64)\n"
        "before = peak()\n"
        "found = pivoted_qr(w, rank=150)\n"
        "print((peak() - before) / 1024)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 200
