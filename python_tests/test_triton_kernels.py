"""The Triton kernels against fp64: on the GPU where there is one, else under the interpreter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import disguises
import helpers
import pytest
import torch
from backend_contract import assert_within_bound
from cases import CORE, VECTOR, Case, Kind, draw, step
from helpers import Operands
from torch import Tensor

from qrlora_kernels.backends import Problem, triton
from qrlora_kernels.backends.triton.tables import Chip
from qrlora_kernels.dispatch.problem import joined

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KIB = 1024
# Stand-ins that choose between pointer and descriptor tiles; few multiprocessors, so that programs
# take several tiles each and the reduction of the skinny product is split.
CHIPS = {
    "pointers": Chip(capability=80, multiprocessors=4, shared=99 * KIB),
    "descriptors": Chip(capability=90, multiprocessors=4, shared=227 * KIB),
}
GRADIENTS = {
    "qr_linear": ("x", "lam"),
    "lora_xs_linear": ("x", "core"),
    "kron_linear": ("x", "a", "b"),
}


@pytest.fixture(autouse=True, scope="module")
def kernels() -> Iterator[Any]:
    """The kernels' host module; conftest.py made sure that it is interpreted without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        triton.available.cache_clear()
        from qrlora_kernels.backends.triton import common

        assert common.INTERPRETED.value == (DEVICE.type == "cpu")
        yield common
    triton.available.cache_clear()


@pytest.fixture(params=CHIPS)
def chip(request: pytest.FixtureRequest, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Chip:
    """On a GPU the chip is what it is; the interpreter plays both kinds."""
    if DEVICE.type == "cuda":
        if request.param != "pointers":
            pytest.skip("a GPU is run once, as itself")
        return kernels.chip_of(DEVICE)
    monkeypatch.setattr(kernels, "chip_of", lambda device: CHIPS[request.param])
    return CHIPS[request.param]


def run(op: str, given: Operands, dy: Tensor) -> dict[str, Tensor]:
    """y and the gradients by the backend's own steps, whether it would be chosen or not."""
    t = {name: v.to(DEVICE) if isinstance(v, Tensor) else v for name, v in given.items()}
    case = Case(helpers.record(op, t), dy.to(DEVICE))
    library_base = op == "kron_linear" and t["bias"] is None
    y = step(triton, case.p, triton.LIBRARY_BASE if library_base else triton.TWO_PHASE)
    h = None
    if op != "kron_linear":
        y, h = y
        assert h.shape == (t["x"].shape[0], case.p.gate.shape[0])
        fp16 = t["x"].dtype == torch.float16
        assert h.dtype == (torch.float32 if fp16 else t["x"].dtype)
    grads = step(triton, case.gradient(h), triton.TWO_PHASE)
    out = {"y": y} | dict(zip(GRADIENTS[op], grads, strict=True))
    for name in GRADIENTS[op]:
        assert out[name].dtype == t[name].dtype, name
    return {name: tensor.cpu() for name, tensor in out.items()}


def check(op: str, given: Operands, dy: Tensor | None = None) -> None:
    """Outputs and gradients lie within the bound of the arithmetic."""
    dy = helpers.gradient_like(op, given) if dy is None else dy
    helpers.assert_error_bound(op, given, dy, run(op, given, dy))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k", "r"), [(1, 40, 24, 1), (7, 72, 104, 3), (37, 40, 304, 16)])
@pytest.mark.parametrize("op", ["qr_linear", "lora_xs_linear"])
def test_gated_linear(chip: Chip, op: str, m: int, n: int, k: int, r: int, dtype: Any) -> None:
    check(op, helpers.operands(op, m, n, k, r, dtype))


@pytest.mark.parametrize("op", ["qr_linear", "lora_xs_linear"])
def test_rank_150_is_padded_not_refused(chip: Chip, op: str) -> None:
    check(op, helpers.operands(op, 21, 56, 136, 150, torch.bfloat16))


@pytest.mark.parametrize("kind", [VECTOR, CORE], ids=lambda kind: kind.gate)
def test_factors_wider_than_the_gate(chip: Chip, kind: Kind) -> None:
    """They hold NaN there."""
    case = draw(kind, 9, 40, 24, 6, torch.float16, train_dtype=torch.float32, wide=10)
    t = {name: v.to(DEVICE) for name, v in case.p._asdict().items() if isinstance(v, Tensor)}
    got = case.given(**t, dy=case.dy.to(DEVICE)).run(triton)
    assert_within_bound(case, {name: tensor.cpu() for name, tensor in got.items()})


def test_rank_above_one_tile(chip: Chip) -> None:
    check("qr_linear", helpers.operands("qr_linear", 18, 24, 40, 300, torch.float16))


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(
    ("m", "n", "k", "r", "dtype"),
    [
        (5, 15, 21, 3, torch.float32),
        (1, 64, 128, 8, torch.bfloat16),
        (9, 240, 96, 24, torch.bfloat16),
        (3, 96, 320, 8, torch.float16),
    ],
)
def test_kron_linear(
    chip: Chip, m: int, n: int, k: int, r: int, dtype: torch.dtype, start: bool
) -> None:
    given = helpers.operands("kron_linear", m, n, k, r, dtype, bias=start)
    if not start:
        given.pop("a0"), given.pop("b0")
    check("kron_linear", given)


@pytest.mark.parametrize("disguise", ["negated", "every second"])
@pytest.mark.parametrize("op", GRADIENTS)
def test_operands_that_are_views(chip: Chip, op: str, disguise: str) -> None:
    """Negated, or with strides in vectors and gates as well."""
    given = helpers.operands(op, 7, 24, 36, 3, torch.float32)
    check(op, {name: disguises.SAME[disguise](t) for name, t in given.items()})


@pytest.mark.parametrize("op", GRADIENTS)
def test_operands_without_memory_are_refused(chip: Chip, op: str) -> None:
    given = helpers.operands(op, 7, 24, 36, 3, torch.float32)
    for name, t in given.items():
        with pytest.raises(TypeError, match="an operand must"):
            run(op, given | {name: disguises.REFUSED["freed"](t)}, t)


def test_kron_factor_longer_than_one_chunk(chip: Chip) -> None:
    given = helpers.operands("kron_linear", 2, 1200, 12, 4, torch.float32)
    check("kron_linear", given)


def test_kron_gradients_in_passes_of_their_own(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What large factors take where the compiler would spill."""
    from qrlora_kernels.backends.triton import kron

    monkeypatch.setattr(kron, "_GRADIENTS_TOGETHER", False)
    monkeypatch.setattr(kron, "fits_one_pass", lambda *sizes: False)
    check("kron_linear", helpers.operands("kron_linear", 5, 48, 32, 8, torch.bfloat16))


# --- Faults that other packages had ---------------------------------------------------------------


def test_offsets_beyond_int32(kernels: Any) -> None:
    """Row 2 of x starts at element 2**31; a 32-bit offset would read before the tensor."""
    stride, k = 2**30, 32
    x = torch.empty(2 * stride + k, dtype=torch.float16, device=DEVICE).as_strided(
        (3, k), (stride, 1)
    )
    given = helpers.operands("qr_linear", 3, 16, k, 4, torch.float16)
    x.copy_(given["x"])
    check("qr_linear", given | {"x": x})


@pytest.mark.parametrize("op", GRADIENTS)
def test_strided_and_transposed_operands(chip: Chip, op: str) -> None:
    """Every second row of x, columns of a wider dy, Conv1D's transposed weight, expanded dy."""
    given = helpers.operands(op, 10, 64, 32, 8, torch.bfloat16)
    given["x"] = given["x"].repeat_interleave(2, 0)[::2]
    given["weight"] = given["weight"].t().contiguous().t()
    wide = torch.randn(10, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    check(op, given, wide[:, ::2])
    check(op, given | {"x": given["x"].t().contiguous().t()}, wide[:1, :64].expand(10, 64))


@pytest.mark.parametrize("op", GRADIENTS)
def test_no_tokens(chip: Chip, op: str) -> None:
    given = helpers.operands(op, 0, 32, 16, 4)
    got = run(op, given, torch.empty(0, 32))
    assert got["y"].shape == (0, 32)
    assert got["x"].shape == (0, 16)
    for name in GRADIENTS[op][1:]:
        assert torch.equal(got[name], torch.zeros_like(given[name]))


@pytest.mark.parametrize("op", GRADIENTS)
def test_poisoned_memory_and_same_bits(chip: Chip, op: str) -> None:
    given = helpers.operands(op, 19, 72, 48, 24, torch.bfloat16)
    dy = helpers.gradient_like(op, given)
    with helpers.poisoned_memory():
        first, second = run(op, given, dy), run(op, given, dy)
    for name, tensor in first.items():
        assert tensor.isfinite().all(), name
        assert helpers.same_bits(tensor, second[name]), name


@pytest.mark.parametrize("op", GRADIENTS)
def test_small_update_survives(chip: Chip, op: str) -> None:
    """A change of 1e-4 of the weight, in bf16, keeps its size on average."""
    given = helpers.operands(op, 128, 64, 64, 8, torch.bfloat16, change=1e-4)
    dy = helpers.gradient_like(op, given)
    still = dict(given)
    if op == "kron_linear":
        still |= {"a": given["a0"], "b": given["b0"]}
    else:
        name = helpers.TRAINABLES[op][0]
        still[name] = torch.zeros_like(given[name])
    update = given["x"].double() @ helpers.delta_weight(op, given).T
    base = run(op, still, dy)["y"]
    gain = helpers.update_gain(run(op, given, dy)["y"], base, update)
    # The gain of the exact result rounded once to bf16, on the same few outputs: both carry the
    # same rounding noise, and a path that rounds before it adds the update is at 0.05.
    best = helpers.update_gain(helpers.exact(op, given).bfloat16(), base, update)
    assert gain == pytest.approx(best, abs=0.02)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("op", GRADIENTS)
def test_infinity_stays_in_its_token(chip: Chip, op: str) -> None:
    """Masked loads have a fill value: a padded 0 must not meet another token's infinity."""
    given = helpers.operands(op, 9, 40, 24, 8, torch.bfloat16)
    given["x"][4, 5] = float("inf")
    dy = helpers.gradient_like(op, given)
    dy[6, 3] = float("inf")
    got = run(op, given, dy)
    assert got["y"].isfinite().all(1).tolist() == [row != 4 for row in range(9)]
    assert got["x"].isfinite().all(1).tolist() == [row != 6 for row in range(9)]


@pytest.mark.parametrize("op", ["qr_linear", "lora_xs_linear"])
def test_nothing_unasked_is_computed(
    op: str, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = helpers.operands(op, 40, 32, 16, 4)
    t = {name: v.to(DEVICE) for name, v in given.items()}
    case = Case(helpers.record(op, t), torch.randn(40, 32, device=DEVICE))
    h = torch.randn(40, 4, device=DEVICE)
    launched: list[str] = []

    def note(kernel: Any, *args: Any, **meta: Any) -> None:
        launched.append(kernel.fn.__name__)

    monkeypatch.setattr(kernels, "launch", note)

    def backward(need_dx: bool, need_gate: bool) -> list[str]:
        launched.clear()
        out = case.backward(triton, h, need_dx, need_gate)
        assert [g is not None for g in out] == [need_dx, need_gate]
        return [name for name in launched if name != "_finish_kernel"]

    assert backward(False, False) == []
    assert backward(True, False) == ["_project_kernel", "_two_phase_kernel"]
    assert backward(False, True) == ["_project_kernel", "_sum_parts_kernel"]


def test_kernel_runs_on_the_tensors_device(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With device 0 current, a launch for device 1 must make device 1 current first."""
    order: list[str] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            order.append(f"enter {self.device}")

        def __exit__(self, *error: object) -> None:
            order.append("leave")

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert len(grid) == 1, "y and z end at 65535 programs"
            return lambda *args, **meta: order.append("launch")

    monkeypatch.setattr(torch.cuda, "device", Guard)
    kernels.launch(Kernel(), 70_000, torch.device("cuda:1"))
    assert order == ["enter cuda:1", "launch", "leave"]


def test_no_atomics_and_no_autotuning() -> None:
    """Atomics lose determinism; autotuning reruns a kernel that accumulates into its output."""
    sources = list(Path(triton.__file__).parent.glob("*.py"))
    assert len(sources) > 5
    for source in sources:
        text = source.read_text()
        assert "tl.atomic" not in text, source
        assert "autotune" not in text, source


def test_import_is_cheap() -> None:
    """Neither the package nor this backend imports Triton, or wakes CUDA, before a call."""
    code = (
        "import sys, torch, qrlora_kernels, qrlora_kernels.backends.triton;"
        "assert 'triton' not in sys.modules; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_supports_says_why_not() -> None:
    def ask(op: str, dtype: torch.dtype, n: int, k: int, r: int, device: Any = DEVICE) -> str:
        problem = joined(Problem(op, torch.device(device), dtype, 8, n, k, r))
        found = triton.supports(problem)
        return found if isinstance(found, str) else found[0].name

    assert ask("qr_linear", torch.bfloat16, 64, 64, 512) == triton.TWO_PHASE
    assert ask("qr_linear", torch.float64, 64, 64, 8) == (
        "Triton kernels compute in float32, float16 and bfloat16, not torch.float64"
    )
    assert "above 256" in ask("lora_xs_linear", torch.bfloat16, 512, 512, 300)
    assert "32768 padded elements" in ask("kron_linear", torch.bfloat16, 592 * 32, 112 * 32, 32)
    other = ask("qr_linear", torch.float32, 1, 1, 1, "meta")
    assert other == "Triton kernels run on CUDA devices, not meta"
