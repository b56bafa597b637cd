"""What ran is the backend and recipe that ``last_choice`` says ran, and that ``explain`` foretells,
for every operation, step, dtype, layout, gate and form."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import golden_bits
import helpers
import pytest
import torch
from golden_bits import LAYOUTS, SCALING, TRAINED, Shape
from recorder import LIBRARY, MEANT, Recorder, recording

from qrlora_kernels import functional, kernels, native
from qrlora_kernels.backends import (
    BACKENDS,
    Choice,
    Problem,
    choose,
    composed,
    cpu,
    cuda,
    last_choice,
)
from qrlora_kernels.dispatch.problem import GATES, PUBLIC_NAMES, problem_of
from qrlora_kernels.operands import LowRank, LowRankGradient

CPU = torch.device("cpu")
FEW, MANY, LARGE = (7, 48, 80, 16), (130, 48, 80, 16), (7, 1024, 1040, 16)
DTYPES = golden_bits.DTYPES


class Case(NamedTuple):
    op: str
    step: str
    backend: str  # or "free"
    dtype: torch.dtype = torch.float32
    layout: str = "rows"  # of the weight
    shape: Shape = FEW
    bias: bool = True

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        bias = "" if self.bias else " no bias"
        return f"{self.op} {self.step} {self.backend} {self.dtype} {self.layout} {shape}{bias}"

    def problem(self) -> Problem:
        return Problem(
            self.op, CPU, self.dtype, *self.shape, step=self.step,
            layout=LAYOUT_OF[self.layout], bias=self.bias,
        )  # fmt: skip

    def can_run(self) -> bool:
        return self.backend == "free" or helpers.supports(self.backend, self.problem())


# How the choosers call the layouts of weights.
LAYOUT_OF = {"rows": "rows", "transposed": "columns", "strided": "strided", "rows apart": "rows"}


def params(cases: list[Case]) -> Iterator[object]:
    for case in cases:
        if case.backend in ("cuda", "triton") or case.can_run():
            yield pytest.param(case, id=str(case))


STEPS = [
    *((op, "fwd") for op in golden_bits.FACTORS),
    *((op, "bwd") for op in golden_bits.FACTORS if op != "linear_add"),  # autograd's own product
]
SETTINGS = [
    *((dtype, "rows", FEW) for dtype in DTYPES),
    *((dtype, "rows", MANY) for dtype in (torch.float32, torch.bfloat16)),
    (torch.float32, "rows", LARGE),
    *((torch.float32, layout, FEW) for layout in LAYOUTS),
    (torch.bfloat16, "transposed", FEW),
]
ON_CPU = [
    Case(*step, backend, *setting)
    for step in STEPS
    for backend in ("free", "reference", "composed", "cpu", "amx")
    for setting in SETTINGS
]
ON_TRITON = [
    Case(op, step, "triton", dtype, layout, bias=bias)
    for op, step in STEPS
    for dtype in ((torch.bfloat16,) if op == "kron_linear" else (torch.bfloat16, torch.float32))
    for layout in ("rows", "transposed")
    for bias in (True, False)
    if bias or step == "fwd"
]
ON_CUDA = [
    Case(op, "fwd", "cuda", torch.bfloat16, layout)
    for op in ("qr_linear", "lora_xs_linear")
    for layout in ("rows", "rows apart")
]


def said_and_ran(case: Case, recorder: Recorder) -> tuple[Choice, set[str]]:
    """The choice that is named after the step, and what ran in it."""
    variant = "rows" if case.layout == "rows" else f"weight {case.layout}"
    given, dy = golden_bits.operands(
        golden_bits.Case(case.op, case.backend, case.dtype, variant, case.shape, 1)
    )
    if not case.bias:
        given["bias"] = None
    names = ("x", *TRAINED[case.op])
    leaves = [given[name].detach().requires_grad_() for name in names]
    given |= zip(names, leaves, strict=True)
    options = {} if case.op == "linear_add" else {"scaling": SCALING}
    if case.backend != "free":
        options["backend"] = case.backend
    with recorder.watching() as forward:
        y = getattr(functional, case.op)(**given, **options)
    ran = forward
    if case.step == "bwd":
        with recorder.watching() as ran:
            torch.autograd.grad(y, leaves, dy)
    choice = last_choice(case.op)
    assert choice is not None
    assert choice == last_choice(case.op, case.step)
    return choice, ran


def check(case: Case) -> None:
    with recording() as recorder:
        said, ran = said_and_ran(case, recorder)
    assert case.backend in ("free", said.backend)
    foretold = choose(case.problem(), None if case.backend == "free" else case.backend)
    assert said == foretold
    assert ran == MEANT[said.backend, said.recipe], f"last_choice says {said}"


def test_every_backend_has_a_meaning() -> None:
    assert {backend for backend, _ in MEANT} == set(BACKENDS)


def test_the_guide_names_every_recipe() -> None:
    text = (golden_bits.TREE / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\|(.*)\|$", text, re.MULTILINE)
    operations = {op for op, _ in PUBLIC_NAMES}
    named = [(backend, recipe) for backend, last in rows for recipe in re.findall("`(.+?)`", last)]
    assert [backend for backend, _ in rows] == list(BACKENDS), "in order of preference"
    assert {pair for pair in named if pair[1] not in operations} == set(MEANT)


@pytest.mark.parametrize("case", params(ON_CPU))
def test_on_the_cpu(case: Case) -> None:
    check(case)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", params(ON_TRITON))
def test_on_triton(case: Case) -> None:
    pytest.importorskip("triton")
    check(case)


@pytest.fixture
def without_a_gpu(fresh_choices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA backend takes tensors of the CPU, and its native call computes nothing."""
    core = SimpleNamespace(cuda_decode=lambda *_: None, cuda_decode_tokens=16)
    monkeypatch.setattr(native, "CORE", core)
    monkeypatch.setattr(native, "runs_on", lambda _: (True, ""))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda, "available", lambda: (True, ""))
    supports, gpu = cuda.supports, torch.device("cuda", 0)
    monkeypatch.setattr(cuda, "supports", lambda p: supports(p._replace(device=gpu)))


@pytest.mark.usefixtures("without_a_gpu")
@pytest.mark.parametrize("case", params(ON_CUDA))
def test_on_cuda(case: Case) -> None:
    check(case)


@pytest.mark.usefixtures("without_a_gpu")
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("qr_linear", "bwd", "cuda", torch.bfloat16), "qr_linear's backward here: no CUDA"),
        (Case("qr_linear", "fwd", "cuda", torch.bfloat16, "transposed"), "rows are contiguous"),
        (Case("lora_xs_linear", "fwd", "cuda", torch.bfloat16, "strided"), "rows are contiguous"),
    ],
    ids=str,
)
def test_what_cuda_has_no_kernel_for_is_refused(case: Case, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check(case)


# --- gates and forms that no layer has


GATED = [
    (step, backend, gate, form, dtype)
    for step in ("fwd", "bwd")
    for backend in (None, "reference", "composed", "cpu")
    for gate in GATES
    for form in ("two_sided", "output")
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("step", "backend", "gate", "form", "dtype"), GATED, ids=str)
def test_gates_and_forms(
    step: str, backend: str | None, gate: str, form: str, dtype: torch.dtype
) -> None:
    m, n, k, r = FEW
    mixed = gate.startswith("mixed")
    index = torch.arange(m) % 3 if mixed else None
    draw = functools.partial(torch.randn, dtype=dtype)
    gates = draw(*(3,) * mixed, *(r,) * (1 + gate.endswith("core")))
    factors = draw(n, r), draw(r, k) if form == "two_sided" else None
    x, dy, weight, bias, h = draw(m, k), draw(m, n), draw(n, k), draw(n), draw(m, r)
    if step == "fwd":
        p = LowRank(x, weight, bias, *factors, gates, index, SCALING)
    else:
        p = LowRankGradient(dy, weight, *factors, gates, index, h, SCALING)
    problem = problem_of(p)
    assert (problem.gate, problem.form, problem.step) == (gate, form, step)
    if backend is not None and not helpers.supports(backend, problem):
        with pytest.raises(ValueError, match=f"backend {backend!r} cannot run"):
            getattr(kernels, f"low_rank_{step}")(*p, backend)
        return
    with recording() as recorder, recorder.watching() as ran:
        getattr(kernels, f"low_rank_{step}")(*p, backend)
    said = last_choice("low_rank", step)
    assert said == choose(problem, backend)
    assert ran == MEANT[said.backend, said.recipe]


# --- planted faults

needs_core = pytest.mark.skipif(native.CORE is None, reason=native.REASON)


@needs_core
@pytest.mark.parametrize("step", ["fwd", "bwd"])
def test_a_step_that_turns_to_another_backend_is_seen(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"low_rank_{step}"
    monkeypatch.setattr(cpu, name, getattr(composed, name))
    with pytest.raises(AssertionError, match=r"last_choice says Choice\(backend='cpu'"):
        check(Case("qr_linear", step, "cpu"))


@needs_core
def test_a_library_product_beside_a_native_call_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_product(p: LowRank, recipe: str) -> object:
        torch.mm(p.x, p.x.mT)
        return step(p, recipe)

    step = cpu.low_rank_fwd
    monkeypatch.setattr(cpu, "low_rank_fwd", with_a_product)
    with recording() as recorder:
        _, ran = said_and_ran(Case("qr_linear", "fwd", "cpu"), recorder)
    assert ran == {"native core", LIBRARY}
