"""The native CPU kernels keep the contract, on every instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import helpers
import pytest
import torch
from backend_contract import (
    Contract,
    assert_within_bound,
    check_no_worse_than_eager,
    on_threads,
)
from cases import CORE, KRON, MIXED_CORE, MIXED_VECTOR, VECTOR, Kind, draw, step
from torch import Tensor

from qrlora_kernels import native, reference
from qrlora_kernels.backends import Problem, amx, choose, core_calls, cpu
from qrlora_kernels.operands import LinearAdd, LowRank, LowRankGradient

needs_core = pytest.mark.skipif(native.CORE is None, reason=native.REASON)


class TestCPU(Contract):
    """The low-rank kernels are right for any number of tokens; the chooser may send them few."""

    backend = cpu


@pytest.mark.parametrize(
    ("backend", "kind", "dtype", "shape"),
    [
        (cpu, VECTOR, torch.float32, (20, 768, 1030)),
        (cpu, CORE, torch.float64, (20, 768, 1030)),
        (cpu, MIXED_VECTOR, torch.float32, (20, 768, 1030)),
        (cpu, MIXED_CORE, torch.float64, (20, 768, 1030)),
        (cpu, VECTOR, torch.float32, (300, 96, 1100)),
        (cpu, CORE, torch.float32, (1100, 130, 160)),
        (cpu, CORE, torch.float64, (40, 4630, 768)),
        (amx, VECTOR, torch.bfloat16, (300, 96, 160)),
        (amx, CORE, torch.bfloat16, (300, 96, 160)),
        (amx, KRON, torch.bfloat16, (300, 96, 160)),
        (amx, VECTOR, torch.bfloat16, (20, 768, 4630)),
        (amx, CORE, torch.bfloat16, (3, 4630, 768)),
        (amx, VECTOR, torch.bfloat16, (300, 4700, 2400)),
    ],
)
def test_same_bits_for_every_number_of_threads(
    backend: ModuleType, kind: Kind, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    ok, reason = backend.available()
    if not ok:
        pytest.skip(reason)
    first, *others = on_threads((1, 2, 3), draw(kind, *shape, 16, dtype), backend)
    for other in others:
        assert all(torch.equal(other[name], t) for name, t in first.items())


@needs_core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kronecker_update_has_the_same_bits_for_every_number_of_threads(
    dtype: torch.dtype,
) -> None:
    """The update alone: the base product is the library's own."""
    case = draw(KRON, 300, 96, 160, 16, dtype)
    code = core_calls.code(update_alone=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = core_calls.kron_update(case.p, code)
            results.append((made, *core_calls.kron_gradients(case.gradient(None), code)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_core
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets(isa: str) -> None:
    """In a process of its own, because the choice is made once."""
    code = (
        "import torch\n"
        "from backend_contract import check_error_bound\n"
        "from cases import KRON, LOW_RANK, draw\n"
        "from qrlora_kernels.backends import amx, cpu\n"
        "assert not amx.available()[0]\n"
        "for dtype in (torch.float64, torch.float32, torch.bfloat16):\n"
        "    for shape in ((7, 33, 3, 3), (40, 96, 160, 16), (40, 300, 450, 150)):\n"
        "        check_error_bound(cpu, draw(KRON, *shape, dtype))\n"
        "for dtype in (torch.float64, torch.float32):\n"
        "    for shape in ((1, 33, 21, 3), (7, 90, 150, 16), (18, 300, 450, 150)):\n"
        "        for kind in LOW_RANK[:4]:\n"
        "            cases = [draw(kind, *shape, dtype, wide=s, seed=s) for s in range(8)]\n"
        "            check_error_bound(cpu, *cases)\n"
    )
    here = os.path.dirname(__file__)
    path = os.pathsep.join(filter(None, (here, os.path.dirname(here), os.getenv("PYTHONPATH"))))
    env = {**os.environ, "QRLORA_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _who(op: str, dtype: torch.dtype, m: int, side: int, r: int) -> str:
    return choose(Problem(op, torch.device("cpu"), dtype, m, side, side, r)).name


@needs_core
@pytest.mark.usefixtures("native_products_behind")
@pytest.mark.parametrize(
    ("m", "side", "r", "name"),
    [
        (32, 4096, 150, "cpu"),
        (33, 257, 16, "composed"),
        (64, 256, 64, "cpu"),
        (64, 256, 65, "composed"),
        (65, 64, 16, "composed"),
    ],
)
def test_how_many_tokens_are_one_native_call(m: int, side: int, r: int, name: str) -> None:
    for op in ("qr_linear", "lora_xs_linear"):
        assert _who(op, torch.float32, m, side, r) == name


@needs_core
@pytest.mark.usefixtures("native_products_ahead")
@pytest.mark.parametrize(
    ("dtype", "m", "side", "r", "name"),
    [
        (torch.float32, 33, 257, 16, "cpu"),
        (torch.float32, 1151, 384, 16, "cpu"),
        (torch.float32, 1152, 384, 16, "composed"),  # W + ΔW
        (torch.float32, 383, 384, 147, "cpu"),
        (torch.float32, 384, 384, 147, "composed"),  # W + ΔW, kept
        (torch.float64, 32, 1024, 64, "cpu"),
        (torch.float64, 511, 1024, 64, "composed"),
        (torch.float64, 512, 1024, 64, "cpu"),
    ],
)
def test_how_many_are_where_the_call_makes_panels(
    dtype: torch.dtype, m: int, side: int, r: int, name: str
) -> None:
    for op in ("qr_linear", "lora_xs_linear"):
        assert _who(op, dtype, m, side, r) == name


@needs_core
@pytest.mark.usefixtures("native_products_ahead")
def test_a_mixed_batch_makes_no_panels() -> None:
    assert _who("mixed_low_rank_linear", torch.float32, 33, 384, 16) == "composed"


@needs_core
@pytest.mark.parametrize("kind", [VECTOR, CORE, KRON], ids=str)
@pytest.mark.parametrize("shape", [(33, 128, 192), (100, 256, 1088), (257, 640, 384)], ids=str)
def test_many_tokens_are_no_worse_than_eager(kind: Kind, shape: tuple[int, int, int]) -> None:
    """By panels that the call makes, around a tile of rows and of columns."""
    cases = [draw(kind, *shape, 64, torch.float32, seed=seed) for seed in range(8)]
    check_no_worse_than_eager(cpu, *cases)


@needs_core
@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        *((cpu, kind) for kind in (VECTOR, CORE, MIXED_VECTOR, MIXED_CORE)),
        *((amx, kind) for kind in (VECTOR, CORE)),
    ],
)
def test_operands_in_any_layout(backend: ModuleType, kind: Kind) -> None:
    """Transposed and strided operands are read as what they hold."""
    if not backend.available()[0]:
        pytest.skip(backend.available()[1])
    dtype = torch.bfloat16 if backend is amx else torch.float32
    case = draw(kind, 9, 40, 72, 10, dtype)

    def strided(t: Tensor) -> Tensor:
        wide = t.new_empty(*t.shape[:-1], 2 * t.shape[-1] + 1)[..., 1::2]
        return wide.copy_(t)

    def turned(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT if t.dim() >= 2 else strided(t)

    for layout in (strided, turned):
        operands = {n: layout(t) for n, t in case.p._asdict().items() if isinstance(t, Tensor)}
        other = case.given(**operands, dy=layout(case.dy))
        assert_within_bound(case, other.run(backend))


@needs_core
@pytest.mark.parametrize("kind", [VECTOR, CORE, MIXED_VECTOR, MIXED_CORE], ids="-".join)
def test_gate_gradients_over_very_many_tokens(kind: Kind) -> None:
    """Sums over tokens of one sign: one long fp32 sum would lose two digits."""
    draws = 2 if kind.gate.endswith("core") else 32  # numbers enough of the gate's gradient
    cases = [draw(kind, 60_000, 8, 8, 16, torch.float32, seed=seed) for seed in range(draws)]
    cases = [case.given(x=case.p.x.abs(), dy=case.dy.abs()) for case in cases]
    check_no_worse_than_eager(cpu, *cases)


@needs_core
@pytest.mark.parametrize("operand", ["x", "weight", "dy", "down"])
def test_infinities_stay_infinities(operand: str) -> None:
    """Vectors that reach back over what is summed already must not meet it again, not even by 0."""
    m, n, k, r = 9, 70, 150, 20
    x, dy, weight = torch.ones(m, k), torch.ones(m, n), torch.ones(n, k)
    up, down, lam = torch.ones(n, r), torch.ones(r, k), torch.ones(r)
    {"x": x, "weight": weight, "dy": dy, "down": down}[operand][:, 60] = float("inf")
    y, h = step(cpu, LowRank(x, weight, None, up, down, lam, None, 1.0))
    dx, dlam = step(cpu, LowRankGradient(dy, weight, up, down, lam, None, h, 1.0))
    want_h = x @ down.T
    want_dx = dy @ weight + (dy @ up * lam) @ down
    assert torch.equal(h, want_h)
    assert torch.equal(y, x @ weight.T + (want_h * lam) @ up.T)
    assert torch.equal(dx, want_dx)
    assert torch.equal(dlam, (want_h * (dy @ up)).sum(0))


@needs_core
@pytest.mark.parametrize(
    ("m", "n", "k", "r"),
    [
        (1, 4096, 512, 2),
        (3, 14336, 80, 8),
    ],
)
def test_long_sums_are_no_worse_than_eager(m, n, k, r):
    """fp32, thousands of terms in T or dx, which summed straight are off by over twice eager."""
    check_no_worse_than_eager(
        cpu, *(draw(KRON, m, n, k, r, torch.float32, seed=seed) for seed in range(16))
    )


@needs_core
@pytest.mark.parametrize("m", [1, 9, 32, 33, 200])
def test_the_streamed_base_product_has_the_same_bits_for_every_number_of_threads(m):
    operands = helpers.operands("kron_linear", m, 1024, 1032, 4)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(helpers.call("kron_linear", operands, backend="cpu:native base"))
    finally:
        torch.set_num_threads(before)
    assert all(helpers.same_bits(y, found[0]) for y in found)


@needs_core
@pytest.mark.parametrize("m", [5, 33, 100])
@pytest.mark.parametrize(("n", "k", "r"), [(8, 0, 2), (0, 8, 2), (0, 0, 2), (8, 8, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_without_a_feature_or_a_rank(dtype: torch.dtype, n: int, k: int, r: int, m: int) -> None:
    """A division by a sum's length ended the process."""
    x, weight = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
    down, up = torch.ones(r, k, dtype=dtype), torch.ones(n, r, dtype=dtype)
    for gate, index in ((torch.ones(r), None), (torch.ones(r, r), None)):
        p = LowRank(x, weight, None, up, down, gate.to(dtype), index, 1.0)
        y, h = cpu.low_rank_fwd(p, "native")
        torch.testing.assert_close(y.double(), reference.low_rank_ref(p).double())
        gradient = LowRankGradient(y, weight, up, down, p.gate, None, h, 1.0)
        dx, dgate = cpu.low_rank_bwd(gradient, "native")
        assert dx.shape == x.shape
        assert dgate.shape == gate.shape
    y = cpu.linear_add_fwd(LinearAdd(x, weight, None, torch.ones(m, n, dtype=dtype)), "native")
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T + 1)
