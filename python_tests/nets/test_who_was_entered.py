"""What ran is what ``last_choice`` says ran, for every operation, step, dtype and layout.

Where today's package says something else, the case is listed in :func:`lie` and has to fail: a case
that comes true fails the test until its line is taken out.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import golden_bits
import pytest
import torch
from golden_bits import LAYOUTS, SCALING, TRAINED, Shape
from recorder import LIBRARY, MEANT, Recorder, recording

from qrlora_kernels import functional, native
from qrlora_kernels.backends import BACKENDS, Problem, composed, cpu, cuda, last_choice
from qrlora_kernels.dispatch import chooser

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

    def chosen(self) -> str | None:
        """The backend that is to run it; None where one is asked for that cannot."""
        problem = Problem(self.op, CPU, self.dtype, *self.shape)
        if self.backend == "free":
            return chooser.choose_freely(problem).name
        return self.backend if chooser.load(self.backend).supports(problem)[0] else None


def lie(case: Case, chosen: str) -> str | None:
    """Why today's ``last_choice`` is not what runs. Each goes with the house's one chooser."""
    if chosen == "cuda" and case.step == "bwd":
        return "every backward of cuda is the composition of library products"
    if chosen == "cuda" and case.layout in ("transposed", "strided"):
        return "cuda leaves a weight without contiguous rows to the composition of library products"
    if case.op != "kron_linear":
        return None
    # One native kernel streams the base product of few fp32 or fp64 tokens, and back only where
    # the weight is large.
    streamed = case.dtype in (torch.float32, torch.float64) and (
        case.shape == LARGE or (case.step == "fwd" and case.shape == FEW)
    )
    if chosen == "cpu" and not streamed:
        return "OHoRA's base product is the library's"
    if chosen == "triton" and (case.step == "bwd" or not case.bias):
        return "triton leaves OHoRA's base product without a bias to the library"
    return None


def params(cases: list[Case]) -> Iterator[object]:
    for case in cases:
        chosen = case.chosen() if case.backend not in ("cuda", "triton") else case.backend
        if chosen is not None:
            why = lie(case, chosen)
            marks = [pytest.mark.xfail(strict=True, reason=why, raises=AssertionError)] * bool(why)
            yield pytest.param(case, id=str(case), marks=marks)


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
    Case(op, step, "cuda", dtype, layout)
    for op, step in STEPS
    if op in ("qr_linear", "lora_xs_linear")
    for dtype in (torch.bfloat16,)
    for layout in ("rows", *LAYOUTS)
]


def said_and_ran(case: Case, recorder: Recorder) -> tuple[str, set[str]]:
    """The backend that is named after the step, and what ran in it."""
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
    return choice.name, ran


def check(case: Case) -> None:
    with recording() as recorder:
        said, ran = said_and_ran(case, recorder)
    assert case.backend in ("free", said)
    assert ran == MEANT[said], f"last_choice says {said}"


def test_every_backend_has_a_meaning() -> None:
    assert set(MEANT) == set(BACKENDS)


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
    core = SimpleNamespace(cuda_decode=lambda *_: None)
    monkeypatch.setattr(native, "CORE", core)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda, "supports", lambda problem: (True, "for this test"))


@pytest.mark.usefixtures("without_a_gpu")
@pytest.mark.parametrize("case", params(ON_CUDA))
def test_on_cuda(case: Case) -> None:
    check(case)


# --- planted faults

needs_core = pytest.mark.skipif(native.CORE is None, reason=native.REASON)


@needs_core
@pytest.mark.parametrize("step", ["fwd", "bwd"])
def test_a_step_that_turns_to_another_backend_is_seen(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"qr_linear_{step}"
    monkeypatch.setattr(cpu, name, getattr(composed, name))
    with pytest.raises(AssertionError, match="last_choice says cpu"):
        check(Case("qr_linear", step, "cpu"))


@needs_core
def test_a_library_product_beside_a_native_call_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_product(x: torch.Tensor, *operands: object) -> object:
        torch.mm(x, x.mT)
        return step(x, *operands)

    step = cpu.qr_linear_fwd
    monkeypatch.setattr(cpu, "qr_linear_fwd", with_a_product)
    with recording() as recorder:
        _, ran = said_and_ran(Case("qr_linear", "fwd", "cpu"), recorder)
    assert ran == {"native core", LIBRARY}
