"""The comparison of bits between two trees sees every changed bit, and nothing where none did.

What it compares is run by hand (README.md): digests belong to one processor and one torch.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import golden_bits
import pytest
import torch
from golden_bits import DTYPES, LAYOUTS, REFUSED, SHAPES, TREE, VARIED, Case, cases, digests

from qrlora_kernels.backends import composed
from qrlora_kernels.operands import LowRankGradient

FEW = r"^(qr_linear|linear_add)/(free|composed|cpu)/(bfloat16|float32)/rows/(7x33|130).*/1 threads"


def test_two_runs_are_equal() -> None:
    first = digests(FEW)
    assert len({value for value in first.values() if value != REFUSED}) > 20
    assert golden_bits.differences(first, digests(FEW)) == []


def test_one_changed_bit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(FEW)
    backward = composed.low_rank_bwd

    def flipped(p: LowRankGradient, recipe: str) -> tuple[torch.Tensor | None, ...]:
        dx, dgate = backward(p, recipe)
        if p.gate.dim() == 1:
            dgate.view(torch.int32)[-1] ^= 1
        return dx, dgate

    monkeypatch.setattr(composed, "low_rank_bwd", flipped)
    seen = golden_bits.differences(before, digests(FEW))
    asked_for = [key for key in before if "qr_linear/composed" in key and key.endswith(":lam")]
    # Where no backend is asked for, it may be the one that is chosen.
    assert [key for key in seen if "/free/" not in key] == asked_for


def test_a_case_on_one_side_alone_is_a_difference() -> None:
    assert golden_bits.differences({"a": "1", "b": "2"}, {"a": "1", "c": "3"}) == ["b", "c"]
    assert golden_bits.differences({"a": "1"}, {"a": REFUSED}) == ["a"]


def test_two_trees_are_compared(tmp_path: Path) -> None:
    """A tree that differs in one line differs in the cases that run this line and in no other."""
    package = tmp_path / "qrlora_kernels"
    shutil.copytree(
        TREE / "qrlora_kernels", package, ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    for core in (TREE / "qrlora_kernels").glob("*.so"):
        (package / core.name).symlink_to(core)
    reference = package / "reference.py"
    text = reference.read_text(encoding="utf-8")
    planted = text.replace(
        "return (y + p.addend.to(y.dtype))", "return (p.addend.to(y.dtype) + 2 * y)"
    )
    assert planted != text
    reference.write_text(planted, encoding="utf-8")
    only = r"/(reference|composed)/float32/rows/7x33x31x1/1 threads"
    seen = golden_bits.compare(TREE, tmp_path, only)
    assert seen == ["linear_add/reference/float32/rows/7x33x31x1/1 threads:y"]


def test_a_tree_without_the_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match="holds no package"):
        golden_bits._import_from(tmp_path)


def test_the_cases_reach_what_they_are_for() -> None:
    """Names are distinct; every layout of every operand; every operation, dtype and thread."""
    every = cases()
    assert len({str(case) for case in every}) == len(every)
    assert {shape[0] for shape in (*SHAPES, *VARIED)} == {1, 7, 33, 130}
    assert {shape[3] for shape in (*SHAPES, *VARIED)} == {1, 3, 16, 150}
    for op in golden_bits.FACTORS:
        for dtype in DTYPES:
            for threads in golden_bits.THREADS:
                mine = {c.variant for c in every if c[:3:2] == (op, dtype) and c.threads == threads}
                assert len(mine) == 1 + len(golden_bits.VARIANTS) - (op != "kron_linear")


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_are_what_their_names_say(how: str) -> None:
    case = Case("qr_linear", "free", torch.float32, f"weight {how}", VARIED[0], 1)
    given, _ = golden_bits.operands(case)
    rows, columns = given["weight"].stride()
    n, k = given["weight"].shape
    assert (rows, columns) == {
        "transposed": (1, n),
        "strided": (2 * k, 2),
        "rows apart": (2 * k, 1),
    }[how]
    plain, _ = golden_bits.operands(case._replace(variant="rows"))
    assert torch.equal(plain["weight"], given["weight"])
