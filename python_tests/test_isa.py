"""What the report says of instruction sets is what the machine says of itself."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

from qrlora_kernels import native
from qrlora_kernels.__main__ import _instruction_sets
from qrlora_kernels.backends import amx

CPUINFO = Path("/proc/cpuinfo")
AVX512 = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
NEEDED = {
    "baseline": (),
    "avx2": ("avx2", "fma"),
    "avx512": AVX512,
    "avx512_bf16": (*AVX512, "avx512_bf16"),
    "amx": (*AVX512, "avx512_bf16", "amx_tile", "amx_bf16"),
}

pytestmark = pytest.mark.skipif(native.CORE is None, reason=native.REASON)


def built_for() -> list[str]:
    return native.build_config()["cpu_kernels"].split(",")


@pytest.mark.skipif(not CPUINFO.is_file(), reason="the system does not list the CPU's features")
@pytest.mark.skipif("avx2" not in built_for(), reason="the names are those of x86-64")
def test_each_missing_feature_is_named_and_no_other() -> None:
    has = set(re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)[1].split())
    sets = native.core().instruction_sets()
    assert set(sets) == set(built_for())
    for isa, reason in sets.items():
        named = re.fullmatch(r"the CPU lacks (.*)|.*", reason)[1]
        missing = [feature for feature in NEEDED[isa] if feature not in has]
        assert (named or "").split(", ") == (missing or [""]), isa


@pytest.mark.skipif(not CPUINFO.is_file(), reason="the system does not list the CPU's features")
@pytest.mark.skipif("avx2" not in built_for(), reason="the names are those of x86-64")
def test_what_the_core_says_of_the_cpu_is_what_the_system_says() -> None:
    has = set(re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)[1].split())
    features = dict(native.core().cpu_features())
    assert features == {name: name in has for name in features}
    assert list(features) == list(NEEDED["amx" if "amx" in built_for() else "avx512_bf16"])


@pytest.mark.parametrize(
    ("missing", "has", "lacks"),
    [
        (
            {"avx512_bf16"},
            "avx2, fma, avx512f, avx512bw, avx512dq, avx512vl, amx_tile, amx_bf16",
            "avx512_bf16",
        ),
        (
            {"amx_tile", "amx_bf16"},
            "avx2, fma, avx512f, avx512bw, avx512dq, avx512vl, avx512_bf16",
            "amx_tile, amx_bf16",
        ),
        (set(), ", ".join(NEEDED["amx"]), "nothing that the kernels use"),
        (set(NEEDED["amx"]), "the baseline alone", ", ".join(NEEDED["amx"])),
    ],
    ids=["AMX_alone", "AVX512-BF16_alone", "both", "neither"],
)
def test_the_report_names_each_apart(
    monkeypatch: pytest.MonkeyPatch, missing: set[str], has: str, lacks: str
) -> None:
    """It said that AMX and AVX512-BF16 are not offered where the CPU has one of them."""
    core = types.SimpleNamespace(
        cpu_features=lambda: [(name, name not in missing) for name in NEEDED["amx"]],
        instruction_sets=native.core().instruction_sets,
    )
    monkeypatch.setattr(native, "CORE", core)
    monkeypatch.setattr(native, "build_config", lambda: {"cpu_kernels": "baseline"})
    assert _instruction_sets()[:2] == [f"  this CPU has: {has}", f"  this CPU lacks: {lacks}"]


def test_the_report_lists_the_sets_that_the_core_was_built_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runpy.run_module("qrlora_kernels", run_name="__main__")
    lines = dict(
        line.strip().removeprefix("kernels for ").split(": ", 1)
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  kernels for ")
    )
    assert list(lines) == built_for()
    for isa, reason in native.core().instruction_sets().items():
        assert lines[isa] == (reason or "run here")


def test_amx_gives_the_reason_of_the_machine() -> None:
    there, reason = amx.available()
    obstacle = native.core().amx_obstacle()
    assert there == (obstacle == "")
    assert there or reason.endswith(": " + obstacle)


def test_a_lower_set_asked_for_is_said_to_be_asked_for() -> None:
    code = (
        "import json; from qrlora_kernels import native\n"
        "print(json.dumps(native.core().instruction_sets()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "QRLORA_ISA": "baseline", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    sets, here = json.loads(done.stdout), native.core().instruction_sets()
    assert sets["baseline"] == ""
    for isa in set(sets) - {"baseline"}:
        assert sets[isa] == (here[isa] if "lacks" in here[isa] else "QRLORA_ISA asks for less")
