"""What every backend must keep, as tests that a backend's own test class inherits.

An ``Op`` holds the operands of one operation, runs a backend's forward and backward on them, and
the same mathematics as the plain PyTorch expression under autograd: in fp64 as the truth, in the
operands' dtype for the comparison with eager over many draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import error_bound
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qrlora_kernels.dispatch.problem import problem_of
from qrlora_kernels.operands import Kron, KronGradient, LowRank, LowRankGradient, Operands

SCALING = 0.7


@dataclass(frozen=True)
class Op:
    """Operands of one operation: rows x and dy, the frozen ones, the trainable ones by name."""

    name: str
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    frozen: dict[str, Tensor | None]
    train: dict[str, Tensor]

    def forward(self, backend: ModuleType) -> tuple[Tensor, Tensor | None]:
        if self.name == "kron_linear":
            p = Kron(self.x, self.weight, self.bias, *self._factors(), SCALING)
            return step(backend, p), None
        y, h = step(backend, LowRank(self.x, self.weight, self.bias, *self._factors(), SCALING))
        return y, h

    def backward(self, backend: ModuleType, h: Tensor | None, *needs: bool) -> tuple[Any, ...]:
        if h is None:
            saved = (self.x, self.weight, *self._factors(), SCALING)
            return step(backend, KronGradient(self.dy, *saved, *needs))
        return step(
            backend, LowRankGradient(self.dy, self.weight, *self._factors(), h, SCALING, *needs)
        )

    def run(self, backend: ModuleType) -> dict[str, Tensor]:
        y, h = self.forward(backend)
        grads = self.backward(backend, h)
        return dict(zip(("y", "dx", *self.train), (y, *grads), strict=True))

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The plain expression and its autograd, everything in ``dtype``."""
        x, weight, bias = (
            None if t is None else t.to(dtype) for t in (self.x, self.weight, self.bias)
        )
        frozen = {k: None if t is None else t.to(dtype) for k, t in self.frozen.items()}
        train = {k: t.to(dtype).clone().requires_grad_() for k, t in self.train.items()}
        x = x.clone().requires_grad_()
        y = F.linear(x, weight, bias) + SCALING * UPDATES[self.name](x, **frozen, **train)
        grads = torch.autograd.grad(y, (x, *train.values()), self.dy.to(dtype))
        return dict(zip(("y", "dx", *train), (y.detach(), *grads), strict=True))

    def _factors(self) -> tuple[Any, ...]:
        every = {**self.frozen, **self.train}
        return tuple(every.get(name) for name in FACTORS[self.name])


def step(backend: ModuleType, p: Operands, recipe: str | None = None) -> Any:
    """The step on ``backend`` by ``recipe``, or by its best one."""
    problem = problem_of(p)
    if recipe is None:
        recipe = backend.supports(problem)[0].name
    return getattr(backend, f"{problem.op}_{problem.step}")(p, recipe)


# In the order of the records of operands.
FACTORS = {
    "qr_linear": ("q", "r", "lam", "index"),
    "lora_xs_linear": ("b", "a", "core", "index"),
    "kron_linear": ("a", "b", "a0", "b0"),
}


def _kron_update(x: Tensor, a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None) -> Tensor:
    tokens = x.reshape(-1, a.shape[1], b.shape[0])
    y = a @ (tokens @ b)
    if a0 is not None and b0 is not None:
        y = y - a0 @ (tokens @ b0)
    return y.reshape(x.shape[0], -1)


UPDATES: dict[str, Callable[..., Tensor]] = {
    "qr_linear": lambda x, q, r, lam: ((x @ r.mT) * lam) @ q.mT,
    "lora_xs_linear": lambda x, a, b, core: ((x @ a.mT) @ core) @ b.mT,
    "kron_linear": _kron_update,
}


def draw(
    name: str,
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    *,
    train_dtype: torch.dtype | None = None,
    bias: bool = True,
    start: bool = True,
    size: float = 0.1,
    seed: int = 0,
) -> Op:
    """Random operands whose update is about ``size`` times the base product."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (std * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(to)

    train_dtype = train_dtype or dtype
    frozen: dict[str, Tensor | None]
    if name == "kron_linear":
        std = (r * k) ** -0.25
        a, b = (normal(rows // r, r, std=std, to=train_dtype) for rows in (n, k))
        frozen = {"a0": None, "b0": None}
        if start:
            frozen = {"a0": a, "b0": b}
            a = a + normal(*a.shape, std=size * std, to=train_dtype)
            b = b + normal(*b.shape, std=size * std, to=train_dtype)
        train = {"a": a, "b": b}
    else:
        down, up = normal(r, k, std=k**-0.5), normal(n, r, std=r**-0.5)
        if name == "qr_linear":
            frozen, train = {"q": up, "r": down}, {"lam": normal(r, std=size, to=train_dtype)}
        else:
            frozen = {"a": down, "b": up}
            train = {"core": normal(r, r, std=size * r**-0.5, to=train_dtype)}
    return Op(
        name, normal(m, k), normal(m, n), normal(n, k, std=k**-0.5),
        normal(n) if bias else None, frozen, train,
    )  # fmt: skip


def assert_within_bound(op: Op, got: dict[str, Tensor]) -> None:
    """Every element of each output and gradient within the bound of the arithmetic."""
    truth = op.plain(torch.float64)
    truth["x"] = truth.pop("dx")
    given = {"x": op.x, "weight": op.weight, "bias": op.bias, **op.frozen, **op.train}
    allowed = error_bound.bounds(op.name, given, op.dy, SCALING, truth)
    error_bound.assert_within_bound(
        {"x" if name == "dx" else name: t for name, t in got.items()}, truth, allowed
    )


def check_error_bound(backend: ModuleType, *ops: Op) -> None:
    """What ``backend`` makes of each of ``ops`` lies within the bound of the arithmetic."""
    for op in ops:
        assert_within_bound(op, op.run(backend))


def check_no_worse_than_eager(backend: ModuleType, *ops: Op) -> None:
    """Contract 1 over many draws: rms errors at most twice the plain expression's."""
    error_bound.assert_no_worse_than_eager(
        [op.run(backend) for op in ops],
        [op.plain(op.x.dtype) for op in ops],
        [op.plain(torch.float64) for op in ops],
    )


def small_update_gain(op: Op, y: Tensor) -> float:
    """Σ (y − base) Δ / Σ Δ², base rounded as the frozen layer rounds it, Δ in fp64."""
    base = F.linear(
        op.x.double(), op.weight.double(), None if op.bias is None else op.bias.double()
    )
    delta = op.plain(torch.float64)["y"] - base
    difference = y.double() - base.to(op.x.dtype).double()
    return float((difference * delta).sum() / (delta * delta).sum())


SHAPES = {
    "qr_linear": [
        (1, 24, 20, 3),
        (7, 33, 31, 1),
        (33, 1, 5, 1),
        (3, 2080, 2112, 16),
        (199, 736, 1504, 16),
        (70, 384, 200, 150),
    ],
    "kron_linear": [
        (1, 24, 20, 4),
        (7, 33, 3, 3),
        (33, 5, 5, 1),
        (3, 2080, 2112, 16),
        (199, 736, 1504, 16),
        (70, 300, 450, 150),
    ],
}
SHAPES["lora_xs_linear"] = SHAPES["qr_linear"]
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


class Contract:
    """Inherit, and name the backend, its operations and its dtypes."""

    backend: ClassVar[ModuleType]
    ops: ClassVar[tuple[str, ...]] = tuple(FACTORS)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    )

    @pytest.fixture(autouse=True)
    def _available(self) -> None:
        ok, reason = self.backend.available()
        if not ok:
            pytest.skip(reason)

    @pytest.fixture(params=(1, 2))
    def threads(self, request: pytest.FixtureRequest) -> Iterator[int]:
        before = torch.get_num_threads()
        torch.set_num_threads(request.param)
        yield request.param
        torch.set_num_threads(before)

    def cases(self) -> Iterator[tuple[str, torch.dtype]]:
        for name in self.ops:
            for dtype in self.dtypes:
                yield name, dtype

    @pytest.mark.parametrize(("dtype", "train_dtype"), DTYPES)
    def test_error_bound(self, dtype: torch.dtype, train_dtype: torch.dtype, threads: int) -> None:
        if dtype not in self.dtypes:
            return
        for name in self.ops:
            for shape in SHAPES[name]:
                for seed in range(4 if shape[0] * shape[1] < 4096 else 1):
                    bias = seed % 2 == 0
                    op = draw(name, *shape, dtype, train_dtype=train_dtype, bias=bias, seed=seed)
                    check_error_bound(self.backend, op)

    def test_kron_without_a_start(self) -> None:
        if "kron_linear" in self.ops:
            op = draw("kron_linear", 40, 96, 64, 16, self.dtypes[-1], start=False)
            check_error_bound(self.backend, op)

    @pytest.mark.parametrize("bias", [True, False])
    def test_small_updates_survive(self, bias: bool) -> None:
        for name, dtype in self.cases():
            if torch.finfo(dtype).bits == 16:
                op = draw(
                    name, 8192, 256, 256, 16, dtype,
                    train_dtype=torch.float32, bias=bias, size=2e-4,
                )  # fmt: skip
                y, _ = op.forward(self.backend)
                assert small_update_gain(op, y) == pytest.approx(1, abs=0.02), name

    def test_fault_09_same_bits_every_run(self, threads: int) -> None:
        for name, dtype in self.cases():
            op = draw(name, 300, 96, 160, 16, dtype)
            first, second = op.run(self.backend), op.run(self.backend)
            assert all(torch.equal(first[key], second[key]) for key in first), name

    def test_fault_16_every_element_is_written(self) -> None:
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
        try:
            for name, dtype in self.cases():
                for shape in SHAPES[name]:
                    op = draw(name, *shape, dtype)
                    assert all(t.isfinite().all() for t in op.run(self.backend).values()), name
        finally:
            torch.use_deterministic_algorithms(False)

    def test_fault_16_nothing_is_left_over_from_a_call_before(self) -> None:
        for name, dtype in self.cases():
            op = draw(name, 35, 48, 80, 16, dtype)
            clean = op.run(self.backend)
            replace(op, x=op.x * torch.nan, dy=op.dy * torch.nan).run(self.backend)
            again = op.run(self.backend)
            assert all(torch.equal(clean[key], again[key]) for key in clean), name

    @pytest.mark.parametrize("m", [3, 34])
    def test_fault_04_strides(self, m: int) -> None:
        for name, dtype in self.cases():
            op = draw(name, m, 48, 80, 16, dtype)
            for strided in (
                replace(op, x=_every_second(op.x), dy=_every_second(op.dy)),
                replace(op, x=_transposed(op.x), dy=_transposed(op.dy)),
                replace(op, weight=_transposed(op.weight)),
                replace(op, weight=_wide(op.weight)),
                replace(op, dy=op.dy[:1].expand_as(op.dy)),
                replace(op, dy=op.dy[:1, :1].expand_as(op.dy)),
            ):
                assert_within_bound(strided, strided.run(self.backend))

    def test_fault_10_no_tokens(self) -> None:
        for name, dtype in self.cases():
            got = draw(name, 0, 48, 80, 16, dtype).run(self.backend)
            assert got.pop("y").shape == (0, 48)
            assert got.pop("dx").shape == (0, 80)
            assert all(not gradient.any() for gradient in got.values())

    def test_fault_06_only_what_is_asked_for(self) -> None:
        for name, dtype in self.cases():
            op = draw(name, 35, 48, 80, 16, dtype)
            _, h = op.forward(self.backend)
            every = op.backward(self.backend, h)
            for wanted in range(2 ** len(every)):
                needs = [bool(wanted >> i & 1) for i in range(len(every))]
                got = op.backward(self.backend, h, *needs)
                assert [g is not None for g in got] == needs, name
                for one, full in zip(got, every, strict=True):
                    if one is not None:
                        distance = (one - full).double().norm()
                        assert distance <= 2 * torch.finfo(dtype).eps * full.double().norm()

    def test_operands_are_left_alone(self) -> None:
        for name, dtype in self.cases():
            op = draw(name, 35, 48, 80, 16, dtype)
            operands = [
                t for t in (op.x, op.dy, op.weight, op.bias, *op.train.values()) if t is not None
            ]
            before = [t.clone() for t in operands]
            op.run(self.backend)
            assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))


def _every_second(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, 0)[::2]


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def _wide(t: Tensor) -> Tensor:
    return torch.cat([t, t], 1)[:, : t.shape[1]]
