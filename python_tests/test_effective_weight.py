"""One product by W + ΔW in place of the update: where it is taken, what it costs, its error."""

from __future__ import annotations

import pytest
import torch
from backend_contract import assert_within_bound
from cases import CORE, VECTOR, Kind, draw, step
from torch.utils._python_dispatch import TorchDispatchMode

from qrlora_kernels import backends
from qrlora_kernels.backends import composed
from qrlora_kernels.dispatch.problem import Problem

N, K, R = 48, 80, 16
CPU = torch.device("cpu")


def recipe(m: int, step: str, **change: object) -> str:
    problem = Problem("low_rank", CPU, torch.float32, m, N, K, R, step)
    return backends.choose(problem._replace(**change), "composed").recipe


@pytest.mark.usefixtures("native_products_behind")
@pytest.mark.parametrize("gate", ["vector", "core"])
@pytest.mark.parametrize(("step", "features"), [("fwd", K), ("bwd", N)])
def test_it_is_taken_from_twice_as_many_tokens_as_features(
    step: str, features: int, gate: str
) -> None:
    assert recipe(2 * features - 1, step, gate=gate) == "addmm"
    assert recipe(2 * features, step, gate=gate) == composed.EFFECTIVE
    free = Problem("low_rank", CPU, torch.float32, 2 * features, N, K, R, step, gate)
    assert backends.choose(free).recipe == composed.EFFECTIVE
    assert "rule 6" in backends.choose(free._replace(m=2 * features - 1)).reason


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.bfloat16, "bias": False},  # W + ΔW would lose a small update
        {"dtype": torch.float16, "bias": False},
        {"gate": "mixed_vector"},
        {"gate": "mixed_core"},
        {"form": "output"},
        {"step": "bwd", "needs": (False, True)},  # no dx, no product by a weight
    ],
    ids=str,
)
def test_it_is_not_taken_where_it_would_be_wrong_or_idle(change: dict[str, object]) -> None:
    assert recipe(4096, **{"step": "fwd", **change}) != composed.EFFECTIVE


@pytest.mark.parametrize("kind", [VECTOR, CORE], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_it_is_within_the_bound(kind: Kind, dtype: torch.dtype, size: float) -> None:
    case = draw(kind, 4 * K, N, K, R, dtype, size=size)
    y, h = step(composed, case.p, composed.EFFECTIVE)
    dx, dgate = step(composed, case.gradient(h, True, True), composed.EFFECTIVE)
    assert_within_bound(case, {"y": y, "x": dx, "gate": dgate})


def test_it_saves_a_product_of_all_tokens_in_each_direction() -> None:
    """And makes one over the features; the weight is not written to."""
    case = draw(VECTOR, 4 * K, N, K, R, torch.float32)
    before = case.p.weight.clone()
    operations = {}
    for how in ("addmm", composed.EFFECTIVE):
        with Operations() as counted:
            composed.low_rank_fwd(case.p, how)
        operations[how] = counted.sum
    m = case.p.x.shape[0]
    assert operations["addmm"] == m * N * K + m * R * (N + K)
    assert operations[composed.EFFECTIVE] == m * N * K + m * R * K + N * R * K
    assert torch.equal(case.p.weight, before)


class Operations(TorchDispatchMode):
    """Counts the multiplications of products."""

    sum = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.sum += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))
