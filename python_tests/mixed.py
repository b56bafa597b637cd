"""Calls with many adapters' gates, for their tests: any leading dimensions, any backend."""

from __future__ import annotations

import pytest
import torch
from cases import MIXED_CORE, MIXED_VECTOR, Case, Kind, draw
from helpers import same_bits
from torch import Tensor

from qrlora_kernels import functional, native

MIXED = pytest.mark.parametrize("kind", [MIXED_VECTOR, MIXED_CORE], ids=lambda kind: kind.gate)
# Nobody's choice, which is one native call for few tokens and library products for many.
WAYS = (None, "composed", "reference", *(("cpu",) if native.CORE is not None else ()))
FEW, MANY = (2, 3), (10, 20)  # leading dimensions


def case_of(kind: Kind, lead: tuple[int, ...] = FEW, dtype: torch.dtype = torch.float32) -> Case:
    """A case with x [*lead, 40], 24 output features and rank 8."""
    rows = torch.Size(lead).numel()
    case = draw(kind, rows, 24, 40, 8, dtype)
    return case.given(x=case.p.x.view(*lead, 40), dy=case.dy.view(*lead, 24))


def call(case: Case, backend: str | None = None) -> Tensor:
    x, weight, bias, up, down, gates, index, scaling = case.p
    y: Tensor = functional.mixed_low_rank_linear(
        x, weight, bias, down, up, gates, index, scaling, backend=backend
    )
    return y


def outcome(case: Case, backend: str | None = None) -> dict[str, Tensor]:
    """y and the gradients of x, bias and the gates."""
    leaves = {
        name: t.clone().requires_grad_()
        for name, t in case.p._asdict().items()
        if name in ("x", "bias", "gate") and t is not None
    }
    y = call(case.given(**leaves), backend)
    y.backward(case.dy)
    return {"y": y.detach()} | {name: t.grad for name, t in leaves.items()}


def flat(case: Case, got: dict[str, Tensor]) -> tuple[Case, dict[str, Tensor]]:
    """The case on [M, K], and its results, as the contract compares them."""
    rows = case.dy.numel() // case.dy.shape[-1]
    made = {n: t.reshape(rows, -1) if n in ("y", "x") else t for n, t in got.items()}
    made.pop("bias", None)
    x, dy = (t.reshape(rows, -1) for t in (case.p.x, case.dy))
    return case.given(x=x, dy=dy, index=case.p.index.long().reshape(-1)), made


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, tensor in want.items():
        assert same_bits(got[name], tensor), name
