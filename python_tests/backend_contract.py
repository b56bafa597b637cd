"""What every backend must keep, as tests that a backend's own test class inherits.

A ``Contract`` holds the backend to every kind of operation, gate and form that it says it supports;
which those are is a table in ``test_backend_support.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import ClassVar

import error_bound
import pytest
import torch
import torch.nn.functional as F
from cases import CORE, KINDS, KRON, VECTOR, Case, Kind, draw, step
from torch import Tensor

from qrlora_kernels.dispatch.problem import Problem, problem_of
from qrlora_kernels.operands import Kron

# --- checks -------------------------------------------------------------------------------------


def bounds_of(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The exact results, and how far each element may lie from them."""
    truth = case.plain(torch.float64)
    op = "kron_linear" if isinstance(case.p, Kron) else "low_rank"
    return truth, error_bound.bounds(op, case.p._asdict(), case.dy, case.p.scaling, truth)


def assert_within_bound(case: Case, *results: dict[str, Tensor]) -> None:
    """Every element of each output and gradient within the bound of the arithmetic."""
    truth, allowed = bounds_of(case)
    for got in results:
        error_bound.assert_within_bound(got, truth, allowed)


def check_error_bound(backend: ModuleType, *cases: Case) -> None:
    """What ``backend`` makes of each of ``cases`` lies within the bound of the arithmetic."""
    for case in cases:
        assert_within_bound(case, case.run(backend))


def check_no_worse_than_eager(backend: ModuleType, *cases: Case) -> None:
    """Contract 1 over many draws: rms errors at most twice the plain expression's."""
    error_bound.assert_no_worse_than_eager(
        [case.run(backend) for case in cases],
        [case.plain(case.p.x.dtype) for case in cases],
        [case.plain(torch.float64) for case in cases],
    )


def small_update_gain(case: Case, y: Tensor) -> float:
    """Σ (y − base) Δ / Σ Δ², base rounded as the frozen layer rounds it, Δ in fp64."""
    x, weight, bias = (None if t is None else t.double() for t in case.p[:3])
    base = F.linear(x, weight, bias)
    delta = case.plain(torch.float64)["y"] - base
    difference = y.double() - base.to(case.p.x.dtype).double()
    return float((difference * delta).sum() / (delta * delta).sum())


# --- the contract -------------------------------------------------------------------------------

# (m, n, k, r)
SHAPES = {
    "low_rank": [
        (1, 24, 20, 3),
        (7, 33, 31, 1),
        (33, 1, 5, 1),
        (3, 2080, 2112, 16),
        (199, 736, 1504, 16),
        (70, 384, 200, 150),
    ],
    "kron": [
        (1, 24, 20, 4),
        (7, 33, 3, 3),
        (33, 5, 5, 1),
        (3, 2080, 2112, 16),
        (199, 736, 1504, 16),
        (70, 300, 450, 150),
    ],
}
SMALL = {
    "low_rank": [(1, 24, 20, 3), (33, 1, 5, 1), (70, 84, 104, 16), (20, 160, 170, 150)],
    "kron": [(1, 24, 20, 4), (33, 5, 5, 1), (70, 96, 112, 16), (20, 300, 150, 150)],
}
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
EVERY_DTYPE = tuple(dict.fromkeys(dtype for dtype, _ in DTYPES))


def refusal(
    backend: ModuleType, kind: Kind, dtype: torch.dtype, step: str = "fwd", device: str = "cpu"
) -> str | None:
    """Why ``backend`` does not run a small problem of this kind, or None where it does."""
    problem = Problem(kind.op, torch.device(device), dtype, 8, 24, 24, 4, step, *kind[1:])
    found = backend.supports(problem)
    return found if isinstance(found, str) else None


class Contract:
    """Inherit, and name the backend."""

    backend: ClassVar[ModuleType]
    # Kinds that take the large shapes too.
    large: ClassVar[tuple[Kind, ...]] = (KRON, VECTOR, CORE)

    @pytest.fixture(autouse=True)
    def _available(self) -> None:
        ok, reason = self.backend.available()
        if not ok:
            pytest.skip(reason)

    def kinds(self, dtype: torch.dtype) -> list[Kind]:
        return [kind for kind in KINDS if refusal(self.backend, kind, dtype) is None]

    def cases(self) -> Iterator[tuple[Kind, torch.dtype]]:
        for dtype in EVERY_DTYPE:
            for kind in self.kinds(dtype):
                yield kind, dtype

    def shapes(self, kind: Kind) -> list[tuple[int, int, int, int]]:
        return (SHAPES if kind in self.large else SMALL)[kind.op]

    @pytest.mark.parametrize(("dtype", "train_dtype"), DTYPES)
    @pytest.mark.parametrize("kind", KINDS, ids="-".join)
    def test_error_bound(self, kind: Kind, dtype: torch.dtype, train_dtype: torch.dtype) -> None:
        """With one thread and with two, with a bias and without, on factors of the gate's width
        and wider."""
        if why_not := refusal(self.backend, kind, dtype):
            pytest.skip(why_not)
        for shape in self.shapes(kind):
            seeds = 1 if shape[0] * shape[1] >= 4096 else 4 if kind in self.large else 2
            for seed in range(seeds):
                case = draw(
                    kind, *shape, dtype,
                    train_dtype=train_dtype, bias=seed % 2 == 0, wide=3 * seed, seed=seed,
                )  # fmt: skip
                assert_within_bound(case, *on_threads((1, 2), case, self.backend))

    def test_every_recipe(self) -> None:
        """Not the preferred one alone: each is to be had by its name."""
        for kind, dtype in self.cases():
            for bias in (True, False):
                case = draw(kind, 9, 48, 80, 16, dtype, bias=bias)
                y, h = case.forward(self.backend)
                for recipe in self.backend.supports(problem_of(case.p)):
                    made = step(self.backend, case.p, recipe.name)
                    y = made if h is None else made[0]
                    p = case.gradient(h)
                    for back in self.backend.supports(problem_of(p)):
                        found = (y, *step(self.backend, p, back.name))
                        got = dict(zip(("y", "x", *case.trains), found, strict=True))
                        assert_within_bound(case, got)

    def test_kron_without_a_start(self) -> None:
        for kind, dtype in self.cases():
            if kind == KRON:
                case = draw(KRON, 40, 96, 64, 16, dtype, start=False)
                check_error_bound(self.backend, case)

    @pytest.mark.parametrize("bias", [True, False])
    def test_small_updates_survive(self, bias: bool) -> None:
        for kind, dtype in self.cases():
            if torch.finfo(dtype).bits == 16:
                shape, size = (8192, 256, 256, 16), 2e-4
                if kind not in self.large:
                    shape, size = (2048, 128, 128, 16), 0.1 * torch.finfo(dtype).eps
                case = draw(kind, *shape, dtype, train_dtype=torch.float32, bias=bias, size=size)
                y, _ = case.forward(self.backend)
                assert small_update_gain(case, y) == pytest.approx(1, abs=0.02), kind

    @pytest.mark.parametrize("threads", [1, 2])
    def test_fault_09_same_bits_every_run(self, threads: int) -> None:
        for kind, dtype in self.cases():
            case = draw(kind, 300, 96, 160, 16, dtype)
            first, second = on_threads((threads, threads), case, self.backend)
            assert all(torch.equal(first[key], second[key]) for key in first), kind

    def test_fault_16_every_element_is_written(self) -> None:
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
        try:
            for kind, dtype in self.cases():
                for shape in self.shapes(kind):
                    case = draw(kind, *shape, dtype, wide=5)
                    assert all(t.isfinite().all() for t in case.run(self.backend).values()), kind
        finally:
            torch.use_deterministic_algorithms(False)

    def test_fault_16_nothing_is_left_over_from_a_call_before(self) -> None:
        for kind, dtype in self.cases():
            case = draw(kind, 35, 48, 80, 16, dtype)
            clean = case.run(self.backend)
            case.given(x=case.p.x * torch.nan, dy=case.dy * torch.nan).run(self.backend)
            again = case.run(self.backend)
            assert all(torch.equal(clean[key], again[key]) for key in clean), kind

    @pytest.mark.parametrize("m", [3, 34])
    def test_fault_04_strides(self, m: int) -> None:
        for kind, dtype in self.cases():
            case = draw(kind, m, 48, 80, 16, dtype)
            x, dy, weight = case.p.x, case.dy, case.p.weight
            for changed in (
                {"x": _every_second(x), "dy": _every_second(dy)},
                {"x": _transposed(x), "dy": _transposed(dy)},
                {"weight": _transposed(weight)},
                {"weight": _wide(weight)},
                {"dy": dy[:1].expand_as(dy)},
                {"dy": dy[:1, :1].expand_as(dy)},
            ):
                check_error_bound(self.backend, case.given(**changed))

    def test_fault_10_no_tokens(self) -> None:
        for kind, dtype in self.cases():
            got = draw(kind, 0, 48, 80, 16, dtype).run(self.backend)
            assert got.pop("y").shape == (0, 48)
            assert got.pop("x").shape == (0, 80)
            assert all(not gradient.any() for gradient in got.values())

    def test_fault_06_only_what_is_asked_for(self) -> None:
        for kind, dtype in self.cases():
            case = draw(kind, 35, 48, 80, 16, dtype)
            _, h = case.forward(self.backend)
            every = case.backward(self.backend, h)
            for wanted in range(2 ** len(every)):
                needs = [bool(wanted >> i & 1) for i in range(len(every))]
                got = case.backward(self.backend, h, *needs)
                assert [g is not None for g in got] == needs, kind
                for one, full in zip(got, every, strict=True):
                    if one is not None:
                        distance = (one - full).double().norm()
                        assert distance <= 2 * torch.finfo(dtype).eps * full.double().norm()

    def test_operands_are_left_alone(self) -> None:
        for kind, dtype in self.cases():
            case = draw(kind, 35, 48, 80, 16, dtype)
            operands = [t for t in (*case.p, case.dy) if isinstance(t, Tensor)]
            before = [t.clone() for t in operands]
            case.run(self.backend)
            assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))


def on_threads(
    numbers: tuple[int, ...], case: Case, backend: ModuleType
) -> list[dict[str, Tensor]]:
    """What ``backend`` makes of the case on so many threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in numbers:
            torch.set_num_threads(threads)
            results.append(case.run(backend))
    finally:
        torch.set_num_threads(before)
    return results


def _every_second(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, 0)[::2]


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def _wide(t: Tensor) -> Tensor:
    return torch.cat([t, t], 1)[:, : t.shape[1]]
