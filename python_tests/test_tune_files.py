"""Files of what was measured: read by another process, kept through failures, in both formats."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import helpers
import pytest
import torch
from contests import (  # noqa: F401  fixtures among them
    PROBLEM,
    clock_of_steps,
    model_of,
    nothing_measured,
    tune,
)

from qrlora_kernels import backends
from qrlora_kernels.dispatch import chooser, tuning


def test_another_process_reads_the_file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "tuning.json"
    tune(model_of(), (5,), path=path)
    assert [p.name for p in path.parent.iterdir()] == ["tuning.json"]
    code = (
        "import torch, qrlora_kernels as qk\n"
        "p = qk.backends.Problem('qr_linear', torch.device('cpu'), torch.float32, 5, 24, 32, 4)\n"
        "print(qk.backends.choose(p).reason)\n"
        "import qrlora_kernels.__main__ as main; print(main.report())"
    )
    monkeypatch.setenv("QRLORA_TUNING", str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("measured on this")
    assert "measured on this machine: 4 problems" in done.stdout


def test_what_was_measured_before_is_kept_in_the_file(tmp_path, monkeypatch):
    path = tmp_path / "tuning.json"
    tune(model_of(), (5,), path=path)
    tuning.clear()
    tune(model_of("lora_xs"), (5,), path=path)
    want = tuning.entries()
    tuning.clear()
    monkeypatch.setenv("QRLORA_TUNING", str(path))
    tuning.read_named_file()
    assert tuning.entries() == want
    assert {(e.op, e.gate) for e in want} == {("low_rank", "vector"), ("low_rank", "core")}
    assert {e.step for e in want} == {"fwd", "bwd"}


def test_what_was_measured_survives_an_interruption(tmp_path, monkeypatch):
    path = tmp_path / "tuning.json"
    module = sys.modules["qrlora_kernels.model.tune"]
    measured, original = [], module.contest

    def stop_at_the_second(*arguments: Any) -> Any:
        if measured:
            raise KeyboardInterrupt
        measured.append(original(*arguments))
        return measured[0]

    monkeypatch.setattr(module, "contest", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        tune(model_of(), (5,), path=path)
    assert backends.choose(measured[0].problem).reason.startswith("measured on this")
    want = tuning.entries()
    tuning.clear()
    tuning.read(path)
    assert tuning.entries() == want
    assert len(want) == 1


def test_a_file_may_be_named_before_it_is_there(tmp_path, monkeypatch):
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("QRLORA_TUNING", str(path))
    tune(model_of(), (5,), path=path)
    assert len(tuning.entries()) == 4


@pytest.mark.parametrize("step", ["fwd", "bwd"])
def test_steps_and_layouts_are_measured_apart(step):
    other = "bwd" if step == "fwd" else "fwd"
    tuning.add([tuning.entry_for(PROBLEM._replace(step=step), "reference")])
    chooser.forget()
    assert backends.choose(PROBLEM._replace(step=step)).name == "reference"
    assert backends.choose(PROBLEM._replace(step=other)).name != "reference"
    columns = PROBLEM._replace(step=step, layout="columns")
    assert backends.choose(columns).name != "reference"


def test_a_recipe_decides_and_one_that_is_not_known_is_passed_over():
    kron = PROBLEM._replace(op="kron_linear")
    assert backends.choose(kron).recipe == "native base"
    for recipe, chosen in (("addmm base", "addmm base"), ("another", "native base")):
        tuning.add([tuning.entry_for(kron, "cpu", "", 1.0, recipe)])
        chooser.forget()
        assert backends.choose(kron).recipe == chosen


def test_a_table_of_the_first_format_is_kept_in_the_second(tmp_path):
    """It said one winner for both steps and every layout."""
    entry = {"chip": "a chip", "op": "qr_linear", "dtype": "float32", "m": 16, "n": 24, "k": 36}
    entry |= {"r": 4, "winner": "composed", "rival": "cpu", "over": 0.5}
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({"format": 1, "entries": [entry]}))
    tune(model_of(), (5,), path=path)
    content = json.loads(path.read_text())
    assert content["format"] == 2
    assert len(content["entries"]) == 5
    (kept,) = [e for e in content["entries"] if e["chip"] == "a chip"]
    assert (kept["op"], kept["gate"], kept["step"], kept["recipe"]) == (
        "low_rank",
        "vector",
        "",
        "",
    )
    want = tuning.entries()
    tuning.clear()
    tuning.read(path)
    assert tuning.entries() == want


def test_what_is_measured_counts_over_what_a_file_says(tmp_path, monkeypatch):
    path = tmp_path / "tuning.json"
    tuning.add([tuning.entry_for(PROBLEM, "composed")])
    tuning.write(path)
    tuning.clear()
    monkeypatch.setenv("QRLORA_TUNING", str(path))
    tuning.add([tuning.entry_for(PROBLEM, "reference")])
    assert tuning.lookup(PROBLEM).winner == "reference"


def test_other_threads_are_another_machine():
    tuning.add([tuning.entry_for(PROBLEM, "composed")])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert tuning.lookup(PROBLEM) is None
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 3, "entries": []}', '{"format": 1, "entries": [{}]}', "\udcff"],
)
def test_a_file_of_something_else_is_an_error(text, tmp_path, monkeypatch):
    path = tmp_path / "tuning.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    monkeypatch.setenv("QRLORA_TUNING", str(path))
    with pytest.raises(ValueError, match=r"QRLORA_TUNING must name a table .*tuning\.json"):
        backends.choose(PROBLEM)


@pytest.mark.parametrize(("field", "value"), [("m", 0), ("m", "1"), ("winner", 3), ("over", None)])
def test_an_entry_of_something_else_is_an_error(field, value, tmp_path, monkeypatch):
    tuning.add([tuning.entry_for(PROBLEM, "composed")])
    path = tmp_path / "tuning.json"
    tuning.write(path)
    content = json.loads(path.read_text())
    content["entries"][0][field] = value
    path.write_text(json.dumps(content))
    tuning.clear()
    monkeypatch.setenv("QRLORA_TUNING", str(path))
    with pytest.raises(ValueError, match=f"{field} is "):
        tuning.read_named_file()
    assert not tuning.entries()


def test_a_missing_file_is_an_error(monkeypatch):
    """At the first call that has to choose, and at each until it is there."""
    monkeypatch.setenv("QRLORA_TUNING", "none.json")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"must name a table .*'none.json': FileNotFound"):
            helpers.call("qr_linear", helpers.operands("qr_linear", 16, 24, 36, 4))
