"""The native CPU kernels keep the contract, on every instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import helpers
import pytest
import torch
from backend_contract import (
    Contract,
    assert_within_bound,
    check_error_bound,
    check_no_worse_than_eager,
    draw,
)

from qrlora_kernels import native
from qrlora_kernels.backends import Problem, amx, choose, cpu

needs_core = pytest.mark.skipif(native.CORE is None, reason=native.REASON)


class TestCPU(Contract):
    backend = cpu
    ops = ("kron_linear",)


class TestFewTokens(Contract):
    """The kernels are right for any number of tokens; the chooser sends them few."""

    backend = cpu
    ops = ("qr_linear", "lora_xs_linear")
    dtypes = (torch.float64, torch.float32)


class TestAMX(Contract):
    backend = amx
    dtypes = (torch.bfloat16,)


@pytest.mark.parametrize(
    ("backend", "name", "dtype", "shape"),
    [
        (cpu, "kron_linear", torch.float32, (300, 96, 160)),
        (cpu, "kron_linear", torch.bfloat16, (300, 96, 160)),
        (cpu, "qr_linear", torch.float32, (20, 768, 1030)),
        (cpu, "lora_xs_linear", torch.float64, (20, 768, 1030)),
        (amx, "qr_linear", torch.bfloat16, (300, 96, 160)),
        (amx, "lora_xs_linear", torch.bfloat16, (300, 96, 160)),
        (amx, "kron_linear", torch.bfloat16, (300, 96, 160)),
        (amx, "qr_linear", torch.bfloat16, (20, 768, 4630)),
        (amx, "lora_xs_linear", torch.bfloat16, (3, 4630, 768)),
        (amx, "qr_linear", torch.bfloat16, (300, 4700, 2400)),
    ],
)
def test_same_bits_for_every_number_of_threads(
    backend: ModuleType, name: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    ok, reason = backend.available()
    if not ok:
        pytest.skip(reason)
    op = draw(name, *shape, 16, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            if backend is cpu and name == "kron_linear":  # the base product is the library's own
                results.append(
                    (
                        cpu.kron_update(op.x, *op._factors(), 0.7),
                        *cpu.kron_gradients(op.dy, op.x, *op._factors(), 0.7, True, True, True),
                    )
                )
            else:
                results.append(tuple(op.run(backend).values()))
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
        "from backend_contract import check_error_bound, draw\n"
        "from qrlora_kernels.backends import amx, cpu\n"
        "assert not amx.available()[0]\n"
        "for dtype in (torch.float64, torch.float32, torch.bfloat16):\n"
        "    for shape in ((7, 33, 3, 3), (40, 96, 160, 16), (40, 300, 450, 150)):\n"
        "        op = draw('kron_linear', *shape, dtype)\n"
        "        check_error_bound(cpu, op)\n"
        "for dtype in (torch.float64, torch.float32):\n"
        "    for shape in ((1, 33, 21, 3), (7, 90, 150, 16), (18, 300, 450, 150)):\n"
        "        for name in ('qr_linear', 'lora_xs_linear'):\n"
        "            ops = [draw(name, *shape, dtype, seed=seed) for seed in range(16)]\n"
        "            check_error_bound(cpu, *ops)\n"
    )
    here = os.path.dirname(__file__)
    path = os.pathsep.join(filter(None, (here, os.path.dirname(here), os.getenv("PYTHONPATH"))))
    env = {**os.environ, "QRLORA_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_core
def test_amx_tiles_are_given_back_to_the_library() -> None:
    """oneDNN's own AMX products agree before, between and after ours."""
    if not amx.available()[0]:
        pytest.skip(amx.available()[1])
    op = draw("qr_linear", 128, 256, 256, 16, torch.bfloat16)
    before = op.x @ op.weight.mT
    for _ in range(3):
        check_error_bound(amx, op)
        assert torch.equal(op.x @ op.weight.mT, before)


@needs_core
@pytest.mark.parametrize(
    ("m", "n", "k", "r"),
    [
        (97, 45, 4700, 21),  # in y's sums three segments
        (97, 4700, 45, 21),  # in dx's
        (70, 70, 4608, 40),  # the base product ends where a segment does not
        (4230, 33, 2400, 8),  # more rows than wait at a time, of two threads too
    ],
)
def test_deep_products_wait_in_fp32_between_their_segments(m: int, n: int, k: int, r: int) -> None:
    if not amx.available()[0]:
        pytest.skip(amx.available()[1])
    for name in ("qr_linear", "lora_xs_linear"):
        check_error_bound(amx, draw(name, m, n, k, r, torch.bfloat16))


@needs_core
def test_many_tokens_in_the_core_gradient() -> None:
    """The contraction over tokens is cut into parts that are added in order."""
    if not amx.available()[0]:
        pytest.skip(amx.available()[1])
    op = draw(
        "lora_xs_linear", 2 * 8192 + 37, 48, 80, 16, torch.bfloat16, train_dtype=torch.float32
    )
    check_error_bound(amx, op)


@needs_core
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize("name", ["qr_linear", "lora_xs_linear"])
def test_few_tokens_on_tiles_in_every_size(name: str, layout: str) -> None:
    """One to four tiles of tokens, and the first count that goes to the larger blocks."""
    if not amx.available()[0]:
        pytest.skip(amx.available()[1])
    for n, k, r in ((33, 47, 3), (70, 101, 37), (96, 130, 16), (15, 200, 8)):
        tokens = (*range(1, 36), 47, 48, 49, 63, 64, 65)
        ops = [draw(name, m, n, k, r, torch.bfloat16, bias=m % 2 == 0) for m in tokens]
        ops = [replace(op, weight=_laid_out(op.weight, layout)) for op in ops]
        ops = [
            replace(op, x=_laid_out(op.x, "strided"), dy=_laid_out(op.dy, "strided")) for op in ops
        ]
        check_error_bound(amx, *ops)


@needs_core
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize(
    ("n", "k"),
    [
        (40, 4200),  # more columns than the sums of one panel
        (1100, 2100),  # more than is swept 64 rows at a time, by two threads too
        (600, 333),  # cached, and no tile fits the edges
    ],
)
def test_a_token_has_the_bits_that_it_has_alone(n: int, k: int, layout: str) -> None:
    """Few tokens are summed in one order, whatever their number and the operands' layout."""
    if not amx.available()[0]:
        pytest.skip(amx.available()[1])
    op = draw("qr_linear", 65, n, k, 21, torch.bfloat16)
    check_error_bound(amx, op)
    want = op.run(amx)
    factors = {name: _laid_out(t, layout) for name, t in op.frozen.items() if t is not None}
    for weight, frozen in ((layout, op.frozen), ("rows", factors), (layout, factors)):
        laid_out = replace(op, weight=_laid_out(op.weight, weight), frozen=frozen)
        for m in (1, 2, 15, 16, 17, 32, 33, 48, 49, 64):
            got = replace(laid_out, x=op.x[:m], dy=op.dy[:m]).run(amx)
            assert torch.equal(got["y"], want["y"][:m]), m
            assert torch.equal(got["dx"], want["dx"][:m]), m


def _laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "columns":
        return t.mT.contiguous().mT
    return torch.cat([t, t], 1)[:, : t.shape[1]] if layout == "strided" else t


@needs_core
@pytest.mark.parametrize(
    ("op", "m", "side", "name"),
    [
        ("qr_linear", 1, 384, "amx"),
        ("lora_xs_linear", 65, 4096, "amx"),
        ("qr_linear", 8192, 1024, "amx"),
        ("linear_add", 2047, 1024, "amx"),
        ("linear_add", 2048, 1024, "composed"),
        ("linear_add", 2048, 2048, "amx"),
    ],
)
def test_what_goes_to_the_tiles_unasked(op: str, m: int, side: int, name: str) -> None:
    if not amx.available()[0]:
        pytest.skip(amx.available()[1])
    problem = Problem(op, torch.device("cpu"), torch.bfloat16, m, side, side, 16)
    assert choose(problem).name == name


@needs_core
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
def test_how_many_tokens_in_fp32_are_one_native_call(m: int, side: int, r: int, name: str) -> None:
    for op in ("qr_linear", "lora_xs_linear"):
        problem = Problem(op, torch.device("cpu"), torch.float32, m, side, side, r)
        assert choose(problem).name == name


@needs_core
@pytest.mark.parametrize("name", ["qr_linear", "lora_xs_linear"])
@pytest.mark.parametrize("backend", [cpu, amx])
def test_operands_in_any_layout(backend: ModuleType, name: str) -> None:
    """Transposed and strided operands are read as what they hold."""
    if not backend.available()[0]:
        pytest.skip(backend.available()[1])
    dtype = torch.bfloat16 if backend is amx else torch.float32
    op = draw(name, 9, 40, 72, 10, dtype)

    def strided(t: torch.Tensor) -> torch.Tensor:
        wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype)[..., 1::2]
        return wide.copy_(t)

    def turned(t: torch.Tensor) -> torch.Tensor:
        return t.mT.contiguous().mT if t.dim() == 2 else strided(t)

    for layout in (strided, turned):
        other = replace(
            op,
            x=layout(op.x),
            dy=layout(op.dy),
            weight=layout(op.weight),
            bias=None if op.bias is None else layout(op.bias),
            frozen={k: None if t is None else layout(t) for k, t in op.frozen.items()},
            train={k: layout(t) for k, t in op.train.items()},
        )
        assert_within_bound(op, other.run(backend))


@needs_core
@pytest.mark.parametrize("name", ["qr_linear", "lora_xs_linear"])
def test_gate_gradients_over_very_many_tokens(name: str) -> None:
    """Sums over tokens of one sign: one long fp32 sum would lose two digits."""
    draws = 2 if name == "lora_xs_linear" else 32  # numbers enough of the gate's gradient
    ops = [draw(name, 60_000, 8, 8, 16, torch.float32, seed=seed) for seed in range(draws)]
    ops = [replace(op, x=op.x.abs(), dy=op.dy.abs()) for op in ops]
    check_no_worse_than_eager(cpu, *ops)


@needs_core
@pytest.mark.parametrize("operand", ["x", "weight", "dy", "down"])
def test_infinities_stay_infinities(operand: str) -> None:
    """Vectors that reach back over what is summed already must not meet it again, not even by 0."""
    m, n, k, r = 9, 70, 150, 20
    x, dy, weight = torch.ones(m, k), torch.ones(m, n), torch.ones(n, k)
    up, down, lam = torch.ones(n, r), torch.ones(r, k), torch.ones(r)
    {"x": x, "weight": weight, "dy": dy, "down": down}[operand][:, 60] = float("inf")
    y, h = cpu.qr_linear_fwd(x, weight, None, up, down, lam, 1.0)
    dx, dlam = cpu.qr_linear_bwd(dy, weight, up, down, lam, h, 1.0)
    want_h = x @ down.T
    want_dx = dy @ weight + (dy @ up * lam) @ down
    assert torch.equal(h, want_h)
    assert torch.equal(y, x @ weight.T + (want_h * lam) @ up.T)
    assert torch.equal(dx, want_dx)
    assert torch.equal(dlam, (want_h * (dy @ up)).sum(0))


@needs_core
@pytest.mark.parametrize(
    ("op", "m", "n", "k", "r"),
    [
        ("kron_linear", 1, 4096, 512, 2),
        ("kron_linear", 3, 14336, 80, 8),
    ],
)
def test_long_sums_are_no_worse_than_eager(op, m, n, k, r):
    """fp32, thousands of terms in T or dx, which summed straight are off by over twice eager."""
    check_no_worse_than_eager(
        cpu, *(draw(op, m, n, k, r, torch.float32, seed=seed) for seed in range(16))
    )


@needs_core
@pytest.mark.parametrize("m", [1, 9, 32])
def test_the_streamed_base_product_has_the_same_bits_for_every_number_of_threads(m):
    operands = helpers.operands("kron_linear", m, 1024, 1032, 4)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(helpers.call("kron_linear", operands, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(helpers.same_bits(y, found[0]) for y in found)
