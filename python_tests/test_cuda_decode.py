"""The CUDA decode kernels: their device code run on the CPU through an emulation, and on a GPU.

The tests with the fixture ``emulated`` say nothing about a GPU: they show that the kernels compute
what they should if the PTX instructions do what the PTX manual says, and that the result does not
depend on the order of threads, on when asynchronous copies land or on how far kernels overlap.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import emulated as emulated_kernels
import error_bound
import helpers
import pytest
import torch
from cases import step
from helpers import HALF, SCALING, Operands, poisoned_memory, same_bits
from torch import Tensor

from qrlora_kernels import native
from qrlora_kernels.backends import cuda

GPU = cuda.available()
OPS = ("qr_linear", "lora_xs_linear")
# More steps than the ring holds and a second round over the rank; rows that start anywhere; tiny.
SHAPES = [(40, 2600, 264), (203, 737, 150), (24, 40, 3)]


@pytest.fixture
def emulated(emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The CUDA backend takes CPU tensors, and its kernels run on the CPU."""
    monkeypatch.setattr(native, "CORE", emulated_cuda)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    emulated_cuda.set_schedule(0)
    yield emulated_cuda
    emulated_cuda.set_schedule(0)


def decode(op: str, given: Operands) -> tuple[Tensor, Tensor]:
    with poisoned_memory():
        y, h = step(cuda, helpers.record(op, given), cuda.DECODE)
    return y, h


def assert_right(op: str, given: Operands, y: Tensor, h: Tensor) -> None:
    x, projection = given["x"], given["r" if op == "qr_linear" else "a"]
    truth = {"y": helpers.exact(op, given), "h": x.double() @ projection.double().T}
    allowed = error_bound.bounds(op, given, torch.zeros_like(truth["y"]), SCALING, truth)
    error_bound.assert_within_bound({"y": y.cpu(), "h": h.cpu()}, truth, allowed)


@pytest.mark.skipif(not GPU[0], reason=f"CUDA kernels cannot run here: {GPU[1]}")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("m", [1, 3, 16])
@pytest.mark.parametrize(("n", "k", "r"), [(4096, 4096, 64), *SHAPES])
@pytest.mark.parametrize("op", OPS)
def test_gpu_against_fp64(op: str, n: int, k: int, r: int, m: int, dtype: torch.dtype) -> None:
    given = helpers.operands(op, m, n, k, r, dtype)
    on_gpu = {name: t.cuda() for name, t in given.items()}
    y, h = decode(op, on_gpu)
    assert same_bits(y, decode(op, on_gpu)[0])
    assert_right(op, given, y, h)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("m", [1, 3, 16])
@pytest.mark.parametrize(("n", "k", "r"), SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_emulated_against_fp64(op: str, n: int, k: int, r: int, m: int, dtype: torch.dtype) -> None:
    given = helpers.operands(op, m, n, k, r, dtype)
    assert_right(op, given, *decode(op, given))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_emulated_without_bias_and_with_a_gate_in_half_precision(
    op: str, dtype: torch.dtype
) -> None:
    given = helpers.operands(op, 5, 48, 320, 40, dtype, bias=False)
    gate = helpers.TRAINABLES[op][0]
    given[gate] = given[gate].to(dtype)
    assert_right(op, given, *decode(op, given))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_emulated_bits_do_not_depend_on_order(
    op: str, dtype: torch.dtype, emulated: ModuleType
) -> None:
    """Fault: a missing barrier or wait. Threads, blocks, copies and kernels, late and early."""
    given = helpers.operands(op, 16, *SHAPES[0], dtype)
    y, h = decode(op, given)
    for schedule in (0, 1, 7):
        emulated.set_schedule(schedule)
        found = decode(op, given)
        assert same_bits(found[0], y), schedule
        assert same_bits(found[1], h), schedule


def every_second_row(t: Tensor) -> Tensor:
    wide = torch.full((2 * t.shape[0], t.shape[1]), torch.nan, dtype=t.dtype)
    wide[::2] = t
    return wide[::2]


def within_columns(t: Tensor, start: int) -> Tensor:
    wide = torch.full((t.shape[0], t.shape[1] + 24), torch.nan, dtype=t.dtype)
    wide[:, start : start + t.shape[1]] = t
    return wide[:, start : start + t.shape[1]]


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "every second row": every_second_row,
    "aligned columns of a wider matrix": lambda t: within_columns(t, 8),
    "columns that start anywhere": lambda t: within_columns(t, 3),
    "column major": lambda t: t.T.contiguous().T,
}


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("op", OPS)
def test_emulated_strides(op: str, how: str) -> None:
    """Every order of sums is the same, aligned or not, so the bits are too. Gaps hold NaN."""
    given = helpers.operands(op, 7, 33, 328, 40, torch.bfloat16)
    y, h = decode(op, given)
    for name in ("x", "weight", *helpers.OPERANDS[op]):
        if given[name].dim() == 1 or (name == "weight" and how == "column major"):
            continue
        found = decode(op, given | {name: STRIDES[how](given[name])})
        assert same_bits(found[0], y), name
        assert same_bits(found[1], h), name


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("op", OPS)
def test_emulated_small_update_survives(op: str) -> None:
    """A change of 1e-4 of the weight, in bf16, keeps its size on average."""
    given = helpers.operands(op, 16, 512, 64, 8, torch.bfloat16, change=1e-4)
    gate = helpers.TRAINABLES[op][0]
    base = decode(op, given | {gate: torch.zeros_like(given[gate])})[0]
    update = given["x"].double() @ helpers.delta_weight(op, given).T
    gain = helpers.update_gain(decode(op, given)[0], base, update)
    # The exact result rounded once carries the same rounding noise.
    best = helpers.update_gain(helpers.exact(op, given).bfloat16(), base, update)
    eager = helpers.update_gain(helpers.plain(op, given), base, update)
    assert gain == pytest.approx(best, abs=0.02)
    assert abs(eager - best) > 0.2


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("op", OPS)
def test_emulated_infinity_stays_in_its_token(op: str) -> None:
    given = helpers.operands(op, 11, 40, 328, 8, torch.bfloat16)
    y, _ = decode(op, given)
    given["x"][6, 5] = torch.inf
    found, _ = decode(op, given)
    others = [i for i in range(11) if i != 6]
    assert same_bits(found[others], y[others])
    assert not found[6].isfinite().any()


def guarded(t: Tensor, after: bool) -> Tensor:
    """A copy of ``t`` beside memory that no one may touch: ``after`` it, or else before it."""
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + (pages if after else 0)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(page), 0) == 0
    offset = pages - size if after else page
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
    return copy.view(t.shape).copy_(t)


def decode_between_guards(library: str) -> None:
    """For a process of its own: an access beyond an operand, an output or scratch ends it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(native, "CORE", emulated_kernels.load(Path(library)))
    patch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    for after in (False, True):

        def new_empty(like: Tensor, *shape: int, after: bool = after, **options: Any) -> Tensor:
            dtype = options.get("dtype", like.dtype)
            return guarded(torch.full(shape, torch.nan, dtype=dtype), after)

        patch.setattr(Tensor, "new_empty", new_empty)
        for op in OPS:
            for shape in ((3, 21, 328, 13), (16, 24, 329, 40), (1, 1, 5, 1)):
                given = helpers.operands(op, *shape, torch.bfloat16)
                y, h = decode(op, {name: guarded(t, after) for name, t in given.items()})
                assert_right(op, given, y, h)


def test_emulated_accesses_stay_within_the_tensors(emulated_cuda: ModuleType) -> None:
    code = "import sys, test_cuda_decode as t; t.decode_between_guards(sys.argv[1])"
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code, str(emulated_cuda.__file__)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr or f"ended by signal {-done.returncode}"


def test_emulation_notices_planted_faults(emulated_cuda: ModuleType) -> None:
    """Fault: a missing wait, of a copy or of a kernel; half a warp; a misaligned copy."""

    def outcomes(ask: Callable[[bool], int], wait: bool) -> set[int]:
        found = set()
        for schedule in (0, 1, 7):
            emulated_cuda.set_schedule(schedule)
            found.add(ask(wait))
        emulated_cuda.set_schedule(0)
        return found

    assert outcomes(emulated_cuda.copies, wait=True) == {12}
    assert outcomes(emulated_cuda.copies, wait=False) == {0, 12}
    assert outcomes(emulated_cuda.two_kernels, wait=True) == {1}
    assert outcomes(emulated_cuda.two_kernels, wait=False) == {0, 1}
    with pytest.raises(RuntimeError, match=r"barrier of .*ptx\.cuh"):
        emulated_cuda.half_a_warp()
    with pytest.raises(RuntimeError, match="misaligned address"):
        emulated_cuda.misaligned()
    assert outcomes(emulated_cuda.copies, wait=True) == {12}
