"""Plain CPU calls go through one native call on the tensors, every other call does not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import helpers
import pytest
import torch
from helpers import OPERANDS, TRAINABLES
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qrlora_kernels import backends, native
from qrlora_kernels.backends import amx
from qrlora_kernels.ops import eager

pytestmark = pytest.mark.skipif(not eager.AVAILABLE, reason=native.REASON)

OPS = ("qr_linear", "lora_xs_linear", "kron_linear")
N, K, R = 24, 36, 3
DTYPES = [torch.float32, torch.float64] + [torch.bfloat16] * amx.available()[0]
in_each = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_each = pytest.mark.parametrize("op", OPS)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the native core answered, call by call: None where it refused."""
    answers: list[Any] = []
    calls = [
        f"{kind}_{step}_call" for kind in ("low_rank", "kron") for step in ("forward", "backward")
    ]
    for name in calls:
        original = getattr(native.CORE, name)

        def spy(*arguments: Any, original: Callable[..., Any] = original) -> Any:
            answers.append(original(*arguments))
            return answers[-1]

        monkeypatch.setattr(native.CORE, name, spy)
    return answers


@pytest.fixture
def only_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other path fails."""

    def fail(*_: Any) -> None:
        raise AssertionError("the call went the long way")

    monkeypatch.setattr("qrlora_kernels.ops.operator.run", fail)
    for op in ("low_rank", "kron"):
        monkeypatch.setattr(f"qrlora_kernels.ops.{op}.check_linear", fail)


@contextlib.contextmanager
def the_long_way() -> Iterator[None]:
    before, eager.AVAILABLE = eager.AVAILABLE, False
    try:
        yield
    finally:
        eager.AVAILABLE = before


# --- taken


@in_each
@of_each
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3), (1,)], ids=str)
def test_plain_calls_are_taken(op, lead, dtype, only_at_once):
    """Forward and backward, for any leading dimensions, in both modes."""
    operands = helpers.operands(op, lead, N, K, R, dtype)
    y = helpers.call(op, operands)
    got = helpers.outcome(helpers.call, op, operands, helpers.gradient_like(op, operands))
    assert helpers.same_bits(got["y"], y)
    assert y.shape == (*lead, N)
    choice = backends.last_choice(op)
    assert choice == backends.choose(
        backends.Problem(op, y.device, dtype, max(1, y.numel() // N), N, K, R, "bwd")
    )
    assert choice.name == ("amx" if dtype == torch.bfloat16 else "cpu")


@of_each
def test_library_products_are_taken(op, only_at_once):
    """From some number of tokens on they are chosen; the native core still answers the checks."""
    operands = helpers.operands(op, (2, 100), N, K, R)
    helpers.outcome(helpers.call, op, operands, helpers.gradient_like(op, operands))
    # OHoRA's update is native all the same, and the base product the library's.
    assert backends.last_choice(op).name == ("cpu" if op == "kron_linear" else "composed")


@of_each
def test_parameters_and_stored_layouts_are_taken(op, only_at_once):
    operands = helpers.operands(op, 7, N, K, R)
    want = helpers.call(op, operands)
    changes: list[dict[str, Any]] = [
        {"weight": torch.nn.Parameter(operands["weight"], requires_grad=False)},
        {TRAINABLES[op][0]: torch.nn.Parameter(operands[TRAINABLES[op][0]])},
        {"weight": operands["weight"].t().contiguous().t()},
        {"x": torch.cat([operands["x"], operands["x"]], 1)[:, :K]},
        {"bias": None},
    ]
    for changed in changes:
        y = helpers.call(op, operands | changed)
        if "bias" not in changed:
            torch.testing.assert_close(y.detach(), want, rtol=1e-5, atol=1e-5)


@in_each
@of_each
@pytest.mark.parametrize("m", [1, 7, 48, 100])
def test_same_bits_as_the_long_way(op, dtype, m):
    for wide_gate in (True, False):
        operands = helpers.operands(op, (m, 2), N, K, R, dtype)
        if not wide_gate:
            narrow = OPERANDS[op] if op == "kron_linear" else TRAINABLES[op]
            operands |= {name: operands[name].to(dtype) for name in narrow}
        dy = helpers.gradient_like(op, operands)
        got = helpers.outcome(helpers.call, op, operands, dy)
        choice = backends.last_choice(op)
        with the_long_way():
            want = helpers.outcome(helpers.call, op, operands, dy)
        assert backends.last_choice(op) == choice
        assert all(helpers.same_bits(got[name], want[name]) for name in want)


@of_each
def test_every_element_is_written(op, only_at_once):
    operands = helpers.operands(op, 7, N, K, R)
    with helpers.poisoned_memory():
        got = helpers.outcome(helpers.call, op, operands, helpers.gradient_like(op, operands))
    assert all(t.isfinite().all() for t in got.values())


@of_each
def test_more_problems_than_choices_are_kept(op, only_at_once):
    """What was chosen is forgotten and chosen again, with the same answer."""
    operands = helpers.operands(op, 1, 2, 2, 1)
    first, choice = helpers.call(op, operands), backends.last_choice(op)
    for m in range(1, 5000):
        y = helpers.call(op, operands | {"x": operands["x"].expand(m, 2)})
        torch.testing.assert_close(y, first.expand(m, 2))
    assert helpers.same_bits(helpers.call(op, operands), first)
    assert backends.last_choice(op) == choice


@of_each
@pytest.mark.parametrize("lead", [(5,), (2, 3), (100,), (2, 100)], ids=str)
def test_results_may_be_written_in_place(op, lead, only_at_once):
    """As those of F.linear: a residual sum and an activation in place, before the backward."""
    operands = helpers.operands(op, lead, N, K, R)
    dy = helpers.gradient_like(op, operands)

    def out_of_place(op: str, operands: dict[str, Any]) -> Tensor:
        return torch.relu(helpers.call(op, operands) + dy)

    def in_place(op: str, operands: dict[str, Any]) -> Tensor:
        y = helpers.call(op, operands)
        y += dy
        return torch.relu_(y)

    got = helpers.outcome(in_place, op, operands, dy)
    want = helpers.outcome(out_of_place, op, operands, dy)
    assert all(helpers.same_bits(got[name], want[name]) for name in want)


@in_each
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(("m", "n", "k"), [(5, 24, 36), (40, 24, 36), (9, 1024, 1026)], ids=str)
def test_kron_gradients_asked_for_one_by_one(m, n, k, start, dtype, only_at_once):
    """With the base product in the call and without, measured from a start and not."""
    operands = helpers.operands("kron_linear", m, n, k, 2, dtype)
    if not start:
        operands |= {"a0": None, "b0": None}
    dy = helpers.gradient_like("kron_linear", operands)
    want = helpers.outcome(helpers.call, "kron_linear", operands, dy)
    for names in (["x"], ["a"], ["b"], ["bias"], ["a", "b"], ["x", "b"]):
        leaves = {name: operands[name].clone().requires_grad_() for name in names}
        y = helpers.call("kron_linear", operands | leaves)
        assert helpers.same_bits(y, want["y"])
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        # Without dx the kernel leaves the start out, which rounds T elsewhere.
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        for name, grad in zip(names, grads, strict=True):
            assert (grad - want[name]).norm() <= tolerance * want[name].norm()
    helpers.assert_error_bound("kron_linear", operands, dy, want)


@of_each
@pytest.mark.parametrize("m", [7, 100])
def test_huge_integers_scale_as_floats_do(op, m, only_at_once):
    operands = helpers.operands(op, m, N, K, R, torch.float64)
    dy = helpers.gradient_like(op, operands)

    def scaled(scaling: float) -> dict[str, Tensor]:
        return helpers.outcome(lambda *o: helpers.call(*o, scaling=scaling), op, operands, dy)

    got, want = scaled(2**70), scaled(2.0**70)
    assert all(helpers.same_bits(got[name], want[name]) for name in want)


# --- refused


class Wrapped(torch.Tensor):
    """A subclass without a behaviour of its own."""


class Seen(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@of_each
@pytest.mark.parametrize("mode", [Seen, Dispatched, torch.no_grad])
def test_modes_see_the_call(op, mode, seen):
    operands = helpers.operands(op, 7, N, K, R)
    want = helpers.call(op, operands)
    del seen[:]
    with mode():
        y = helpers.call(op, operands)
    assert helpers.same_bits(y, want)
    # A mode of functions is handed the call and makes it again, outside itself.
    assert (seen[0] is None) == (mode is not torch.no_grad)
    assert len(seen) == (2 if mode is Seen else 1)


@of_each
def test_a_dispatch_mode_sees_one_operator(op):
    names: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        helpers.call(op, helpers.operands(op, 7, N, K, R))
    operator = "kron" if op == "kron_linear" else "low_rank"
    assert f"qrlora.{operator}_fwd.default" in names


@of_each
@pytest.mark.parametrize("name", ["x", "weight", "bias", 0, 1, 2])
def test_subclasses_are_not_read(op, name, seen):
    operands = helpers.operands(op, 7, N, K, R)
    want = helpers.call(op, operands)
    del seen[:]
    name = OPERANDS[op][name] if isinstance(name, int) else name
    y = helpers.call(op, operands | {name: operands[name].as_subclass(Wrapped)})
    assert seen == [None, None]  # again once its __torch_function__ had its turn
    assert helpers.same_bits(y.as_subclass(Tensor), want)


@of_each
def test_layouts_that_no_kernel_reads(op, seen):
    """Columns apart in x, both dimensions apart in an operand, a bias that is not contiguous."""
    operands = helpers.operands(op, (4, 2), N, K, R)
    want = helpers.call(op, operands)
    del seen[:]

    def apart(t: Tensor) -> Tensor:
        return torch.stack([t, -t], -1)[..., 0]

    changes = [{name: apart(operands[name])} for name in ("x", "weight", "bias", *OPERANDS[op])]
    changes.append({"x": operands["x"].transpose(0, 1).contiguous().transpose(0, 1)})
    for changed in changes:
        torch.testing.assert_close(helpers.call(op, operands | changed), want)
    # A single column, or a core of one rank, has no second stride that could matter.
    assert seen == [None] * len(changes)


@of_each
def test_other_states_are_not_taken(op, seen, monkeypatch):
    """Autocast, torch.func, forward mode, tracing and every way to ask for a backend."""
    operands = helpers.operands(op, 7, N, K, R)
    x = operands["x"]

    def by(x: Tensor, **options: Any) -> Tensor:
        return helpers.call(op, operands | {"x": x}, **options)

    with torch.autocast("cpu", torch.bfloat16):
        assert by(x).dtype == torch.bfloat16
    torch.func.vmap(by)(x[None])
    torch.jit.trace(by, x, check_trace=False)  # the check is a plain call
    with forward_ad.dual_level():
        by(forward_ad.make_dual(x, x))
    by(x, backend="reference")
    with backends.use_backend("reference"):
        by(x)
    monkeypatch.setenv("QRLORA_BACKEND", "reference")
    by(x)
    assert backends.last_choice(op) == backends.Choice("reference", "plain", "asked for")
    assert all(answer is None for answer in seen)
    monkeypatch.delenv("QRLORA_BACKEND")
    by(x)
    assert seen[-1] is not None


@of_each
def test_frozen_operands_that_ask_are_not_taken(op, seen):
    operands = helpers.operands(op, 7, N, K, R)
    names = ["weight", *(name for name in OPERANDS[op] if name not in TRAINABLES[op])]
    for name in names:
        asking = operands | {name: operands[name].clone().requires_grad_()}
        assert helpers.call(op, asking).requires_grad
        with torch.no_grad():
            assert not helpers.call(op, asking).requires_grad
    assert [answer is None for answer in seen] == [True, False] * len(names)


@of_each
def test_backward_looks_for_itself(op, seen):
    """What holds in the forward need not hold when its backward runs."""
    operands = helpers.operands(op, (2, 3), N, K, R)
    dy = helpers.gradient_like(op, operands)
    want = helpers.outcome(helpers.call, op, operands, dy)["x"]

    def gradient(dy: Tensor) -> Tensor:
        x = operands["x"].clone().requires_grad_()
        y = helpers.call(op, operands | {"x": x})
        del seen[:]
        return torch.autograd.grad(y, x, dy)[0]

    for other in (dy.as_subclass(Wrapped), torch.stack([dy, dy], -1)[..., 0]):
        torch.testing.assert_close(gradient(other).as_subclass(Tensor), want)
        assert seen == [None]
    with backends.use_backend("reference"):
        x = operands["x"].clone().requires_grad_()
    y = helpers.call(op, operands | {"x": x})
    with backends.use_backend("reference"):
        y.backward(dy)
    assert backends.last_choice(op).name == "reference"
    torch.testing.assert_close(x.grad, want)


@of_each
def test_wrong_operands_get_the_same_errors(op):
    good = helpers.operands(op, 7, N, K, R)
    wrong: list[dict[str, Any]] = [{"scaling": s} for s in ("1", None, True, torch.tensor(1.0))]
    for name in ("x", "weight", "bias", *OPERANDS[op]):
        values = [good[name][:-1], good[name][..., None], good[name].double(), good[name].long()]
        values += [good[name].to("meta"), good[name].to_sparse(), "tensor"]
        # Fewer rows, and a vector that uses a part of the factors, are nothing wrong.
        wrong += [{name: v} for v in values[1 if name in ("x", "lam") else 0 :]]
    for changed in wrong:
        given = good | {k: v for k, v in changed.items() if k != "scaling"}
        options = {k: v for k, v in changed.items() if k == "scaling"}
        messages = []
        for way in (contextlib.nullcontext, the_long_way):
            with way(), pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
                helpers.call(op, given, **options)
            messages.append((caught.type, str(caught.value)))
        assert messages[0] == messages[1]


@of_each
def test_no_tokens_and_no_data(op):
    operands = helpers.operands(op, 0, N, K, R)
    assert helpers.call(op, operands).shape == (0, N)
    meta = {name: t.to("meta") for name, t in helpers.operands(op, 7, N, K, R).items()}
    y = helpers.call(op, meta)
    assert y.is_meta
    assert y.shape == (7, N)
