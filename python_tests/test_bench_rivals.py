"""The benchmark's compositions by hand: right in y, dx and gradients, or absent with a reason."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import gate, losses, registry, shares
from bench.case import Case, GridCase
from bench.competitors import Layer, onednn, rivals, temporarily
from bench.competitors import compositions as c
from bench.competitors.onednn import CHUNK, Library, OneDNN
from bench.competitors.plain import EAGER, expression
from bench.memory import saved_bytes
from bench.problem import LayerProblem, Runner, Unavailable
from bench.registry import Effort
from bench.rows import OK, OTHER, RED, SKIPPED, Row
from bench.suites import cpu, layer
from bench.suites.common import Gates, Options, results

BRIEF = Effort(seconds=0.02, min_rounds=2, max_rounds=2)
HERE = Options(effort=BRIEF)
KINDS = (
    *(c.UpdateFirst, c.BaseFirst, c.OutputSide),
    *(c.EffectiveWeight, c.Stacked, c.OneAccumulator),
)
OTHERS = (("ohora", c.Kron), ("lora", c.LoRA), ("", c.Frozen))
HALF_KINDS = (c.UpdateFirst, c.OneAccumulator)  # those that the suite lists in half precision
LAYERS = {layer.key: layer for layer in rivals.rivals()}
# Sums that are cut in both directions; then in one, with tokens enough for W + ΔW.
LONG = Case(33, CHUNK + 24, 2 * CHUNK + 76, 5, "fp32")
FLAT = Case(33, 12, 2 * CHUNK + 76, 5, "fp32")
TALL = Case(33, 2 * CHUNK + 76, 12, 3, "fp32")

needs_onednn = pytest.mark.skipif(
    bool(onednn.absence(torch.float32, False) or onednn.absence(torch.float32, True)),
    reason="oneDNN's products are not to be called here",
)


def library(problem: LayerProblem) -> c.Frozen:
    return c.Frozen(problem.weight, problem.bias, Library)


def built(family: str, kind: type, problem: LayerProblem) -> Runner:
    base = library(problem)
    if family in c.GATES:
        return rivals.low_rank(family, kind, base, problem)
    if family == "ohora":
        return rivals._kron(lambda _: base, problem)
    return rivals._lora(lambda _: base, problem) if family == "lora" else Runner(base)


# --- the numbers


@pytest.mark.parametrize(
    ("family", "kind"),
    [*((f, k) for f in c.GATES for k in KINDS), *OTHERS],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_the_order_of_products_changes_no_number(family: str, kind: type) -> None:
    """In fp64 y, dx and the gradients are those of the definition to its rounding."""
    problem = LayerProblem(Case(7, 24, 40, 3, "fp64"), "cpu")
    found, expected = results(built(family, kind, problem), problem), problem.expected(family)
    assert set(found) == set(expected)
    for name, exact in expected.items():
        assert found[name].dtype == torch.float64
        assert float((found[name] - exact).norm() / exact.norm()) < 1e-13, name


@pytest.mark.parametrize("kind", HALF_KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("family", c.GATES)
def test_in_half_precision_what_is_listed_is_as_exact_as_eager(family: str, kind: type) -> None:
    problem = LayerProblem(Case(17, 48, 64, 5, "bf16"), "cpu")
    verdict = Gates(problem).judge(Layer("", family, lambda p: p), built(family, kind, problem))
    assert verdict.ok, verdict.detail


@needs_onednn
@pytest.mark.parametrize("case", [LONG, FLAT, TALL], ids=str)
@pytest.mark.parametrize("key", LAYERS)
def test_each_rival_is_as_exact_as_eager(key: str, case: Case) -> None:
    rival, problem = LAYERS[key], LayerProblem(case, "cpu")
    try:
        found = results(rival.start(problem), problem)
    except Unavailable:
        return  # test_where_a_composition_is_absent says which, and why
    expected = problem.expected(rival.adapter)
    family = {**EAGER, "lora": lora_eager}[rival.adapter]
    plain = results(expression(rival.adapter, family, problem), problem)
    verdict = gate.judge(found, plain, expected)
    assert verdict.ok, verdict.detail
    assert set(found) == set(expected)
    for name, exact in expected.items():
        assert float((found[name].double() - exact).norm() / exact.norm()) < 2e-6, name


def lora_eager(x: Any, weight: Any, bias: Any, a: Any, b: Any) -> torch.Tensor:
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b)


# --- how a matrix is laid out


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True])
def test_long_sums_are_cut_into_contiguous_pieces(transposed: bool) -> None:
    whole = torch.randn(2 * CHUNK + 8, 20).mT if transposed else torch.randn(20, 2 * CHUNK + 8)
    pieces = OneDNN(whole, packed=False, tokens=4).pieces
    assert len(pieces) == 3
    assert all(piece.shape[1] <= CHUNK for piece in pieces)
    assert all(piece.is_contiguous() or piece.mT.is_contiguous() for piece in pieces)
    assert torch.equal(torch.cat(pieces, 1), whole)


def test_in_half_precision_a_sum_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece would round it once more."""
    monkeypatch.setattr(onednn, "absence", lambda dtype, packed: "")
    matrix = torch.zeros(4, 3 * CHUNK, dtype=torch.bfloat16)
    assert len(OneDNN(matrix, packed=False, tokens=4).pieces) == 1


@needs_onednn
def test_what_a_layer_saves_is_counted_beside_packed_weights() -> None:
    """They are tensors without a storage that Python can ask for."""
    problem = LayerProblem(Case(16, 64, 96, 4, "fp32"), "cpu")
    runner = LAYERS["qr base first packed"].start(problem)
    assert saved_bytes(lambda: runner.forward(problem.x), problem.x) == 16 * 4 * 4  # h


# --- where a composition is absent

IN_HALF = "in half precision it rounds"
ABSENT = {
    ("qr base first", "bf16", "wide"): f"{IN_HALF} y before the update",
    ("lora_xs stacked packed", "bf16", "wide"): f"{IN_HALF} y before the update",
    ("qr output side packed", "bf16", "wide"): f"{IN_HALF} y before the update",
    ("qr output side", "fp32", "tall"): "where N > K the input is the shorter side",
    ("qr effective weight", "bf16", "tall"): f"{IN_HALF} W + ΔW",
    ("lora_xs effective weight", "fp32", "wide"): "up to N K / (N + K) tokens",
    ("qr one accumulator packed", "fp32", "wide"): "in half precision alone",
}


@pytest.mark.parametrize(("key", "dtype", "shape"), ABSENT)
def test_where_a_composition_is_absent(key: str, dtype: str, shape: str) -> None:
    case = dataclasses.replace(LONG if shape == "wide" else TALL, dtype=dtype)
    with pytest.raises(Unavailable, match=re.escape(ABSENT[key, dtype, shape])):
        LAYERS[key].start(LayerProblem(case, "cpu"))


def test_fp64_has_w_plus_delta_alone() -> None:
    problem = LayerProblem(dataclasses.replace(TALL, dtype="fp64"), "cpu")
    found = results(LAYERS["qr effective weight"].start(problem), problem)
    assert float((found["y"] - problem.expected("qr")["y"]).abs().max()) < 1e-12
    with pytest.raises(Unavailable, match="oneDNN multiplies no float64 on this processor"):
        LAYERS["qr base first"].start(problem)


def raising(error: Exception) -> Any:
    def call(*_: Any) -> Any:
        raise error

    return call


def oneDNN(linear: Any, binary: Any) -> Any:
    """A stand-in for ``torch.ops.mkldnn``."""
    linear.binary = binary
    return SimpleNamespace(_linear_pointwise=linear, _reorder_linear_weight=lambda w, tokens: w)


def test_a_processor_says_why_it_has_no_such_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(stand_in: Any) -> str:
        monkeypatch.setattr(torch.ops, "mkldnn", stand_in)
        return onednn.absence.__wrapped__(torch.float32, True)

    def linear(x: Any, w: Any, bias: Any, *_: Any) -> Any:
        return F.linear(x, w, bias)

    def binary(x: Any, y: Any, w: Any, bias: Any, how: str) -> Any:
        return y + F.linear(x, w, bias)

    assert reason(oneDNN(linear, binary)) == ""
    assert "has no oneDNN products to call" in reason(SimpleNamespace())
    wrong = oneDNN(linear, lambda x, y, *_: y)
    assert reason(wrong) == "oneDNN's products of float32 are wrong on this processor"
    none = oneDNN(raising(RuntimeError("no primitive")), binary)
    assert reason(none) == "oneDNN multiplies no float32 on this processor"


# --- the suite


@needs_onednn
def test_the_suite_has_two_floors_and_every_variant_or_its_reason() -> None:
    found = cpu.run(GridCase(20, 24, 40, "fp32", (2, 4)), HERE)
    assert {row.status for row in found if row.adapter == "lora"} == {OTHER}
    assert not [row for row in found if row.status == RED]
    assert all(row.note for row in found if row.status == SKIPPED)
    assert {f"{row.adapter} {row.variant}".strip() for row in found} >= set(LAYERS)
    both = [row for row in found if row.metric == "both"]
    ranks = {key: [] for key in ("frozen", "base first packed", "over frozen packed")}  # type: ignore[var-annotated]
    for row in both:
        assert row.ratio is not None
        if row.variant in ranks and row.adapter in ("", "qr", "lora"):
            ranks[row.variant].append(row.r)
    assert ranks == {"frozen": [0], "base first packed": [2, 4], "over frozen packed": [8]}
    (packed,) = [row for row in both if row.variant == "frozen packed"]
    assert packed.status == OK
    assert packed.gate is not None
    assert len({row.key() for row in both}) == len(both)
    lines = shares.shares_table(found).splitlines()
    assert len(lines) == 4 + 2 * 5  # qr and LoRA-XS at both ranks, prepacked and not
    assert sum("QR-LoRA prepacked" in line for line in lines) == 2
    for ours, best in losses.contests(both):  # what costs no memory has no rival that does
        assert ours.variant.endswith("prepacked") or not best.variant.endswith("packed")


def test_a_wrong_frozen_layer_turns_red() -> None:
    def twice(problem: LayerProblem) -> Runner:
        return Runner(lambda x: 2 * F.linear(x, problem.weight, problem.bias))

    with temporarily(Layer("frozen twice", "", twice)):
        found = layer.run(Case(5, 8, 8, 2, "fp32"), dataclasses.replace(HERE, variants=("eager",)))
    red = [row for row in found if row.variant == "frozen twice"]
    assert {row.status for row in red} == {RED}
    assert {row.ratio for row in red} == {None}


def test_without_half_products_only_small_cases_of_halves_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shown(has: bool) -> list[Any]:
        monkeypatch.setattr(registry, "multiplies", lambda *_: has)
        return list(registry.cases("cpu", "cpu", "short", gate_only=False))

    every, few = shown(True), shown(False)
    assert [case for case in every if case.dtype == "fp32"] == few[: len(every) // 2]
    small = few[len(every) // 2 :]
    assert len(small) < len(every) // 2
    assert {case.dtype for case in small} == {"bf16"}
    assert {(case.n, case.k) for case in small} == {(case.n, case.k) for case in every}
    assert all(case.m * case.n * case.k <= 3e8 for case in small)


# --- its table


def row(variant: str, value: float, adapter: str = "qr", **changes: Any) -> Row:
    spread = {"q20": value, "q80": value, "first": value, "second": value}
    shape = {"m": 16, "n": 1024, "k": 1024, "r": 16 if adapter == "qr" else 0, "dtype": "fp32"}
    made = Row("cpu", variant, "both", adapter=adapter, value=value, **spread, **shape)
    return dataclasses.replace(made, **changes)


def shown(*found: Row) -> list[str]:
    lines = shares.shares_table(list(found)).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| ---"))
    return [cell.strip() for cell in lines[head + 1].strip("|").split("|")]


EAGER_ROW = row("eager", 4.0)


def test_shares_are_of_both_frozen_layers_and_say_whether_the_limit_is_met() -> None:
    floors = [row("frozen", 2.0, ""), row("frozen packed", 1.6, "")]
    lora = [row("over frozen", 3.2, "lora"), row("over frozen packed", 2.4, "lora")]
    line = shown(*floors, *lora, row("qrlora_kernels", 2.0), EAGER_ROW)
    assert line == [
        *("QR-LoRA 1024×1024 fp32", "16", "16", "1.00", "1.25", "≤ 1.25", "met", "0.50"),
        *("0.50 eager", "1.50", "0.80"),
    ]
    late = shown(*floors, row("qrlora_kernels", 2.1), EAGER_ROW)
    assert late[4:7] == ["1.31", "≤ 1.25", "**not met**"]
    assert late[9] == "–"
    # From 512 tokens on less is allowed.
    more = [dataclasses.replace(one, m=512) for one in (*floors, row("qrlora_kernels", 2.0))]
    assert shown(*more, dataclasses.replace(EAGER_ROW, m=512))[5:7] == ["≤ 1.15", "**not met**"]


def test_the_best_frozen_layer_may_be_the_plain_one() -> None:
    floors = [row("frozen", 2.0, ""), row("frozen packed", 3.0, "")]
    line = shown(*floors, row("qrlora_kernels", 2.2), EAGER_ROW)
    assert line[3:7] == ["1.10", "1.10", "≤ 1.25", "met"]


def test_without_a_packed_layer_nothing_is_said_of_the_limit() -> None:
    line = shown(row("frozen", 2.0, ""), row("qrlora_kernels", 1.0), EAGER_ROW)
    assert line[3:] == ["0.50", "–", "≤ 1.25", "", "0.25", "0.25 eager", "–", "–"]


def test_other_suites_have_no_shares() -> None:
    assert shares.shares_table([row("frozen", 1.0, "", suite="grid")]) == ""
