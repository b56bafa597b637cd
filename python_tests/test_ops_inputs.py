"""What the operations take and refuse, and which backend answers."""

from __future__ import annotations

import helpers
import pytest
import torch
from helpers import OPERANDS, OPS, TRAINABLES

from qrlora_kernels import backends
from qrlora_kernels.backends import Problem, products
from qrlora_kernels.dispatch import chooser
from qrlora_kernels.dispatch.problem import joined, problem_of

N, K, R = 24, 36, 3
# What is looked for here, wrong rows or columns, is wrong by about 1.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.02, "atol": 0.05},
}
in_both = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def _agrees_with_exact(op, operands, dy, changed):
    """Outputs and gradients of every backend, where ``changed(leaf)`` is the view that is used."""
    wide = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in operands.items()}
    truth = helpers.outcome(helpers.exact, op, wide, dy)
    for backend in helpers.cpu_backends(op, operands["x"].dtype):

        def viewed(_, given, backend=backend):
            return helpers.call(op, given | {"x": changed(given["x"])}, backend=backend)

        got = helpers.outcome(viewed, op, operands, dy)
        for name, want in truth.items():
            torch.testing.assert_close(
                got[name], want, **TOLERANCE[dy.dtype], check_dtype=False, msg=f"{backend} {name}"
            )


# --- shapes and strides


@in_both
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0), (1,)], ids=str)
def test_leading_dimensions(op, lead, dtype):
    operands = helpers.operands(op, lead, N, K, R, dtype)
    dy = helpers.gradient_like(op, operands)
    _agrees_with_exact(op, operands, dy, lambda x: x)


LAYOUTS = {
    "strided rows": lambda x: torch.stack([x, x]).transpose(0, 1).reshape(-1, K)[::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "strided columns": lambda x: torch.stack([x, -x], -1)[..., 0],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


@in_both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_strides_of_x(op, layout, dtype):
    operands = helpers.operands(op, 7, N, K, R, dtype)
    changed = LAYOUTS[layout]
    assert layout == "offset" or not changed(operands["x"]).is_contiguous()
    assert torch.equal(changed(operands["x"]), operands["x"])
    _agrees_with_exact(op, operands, helpers.gradient_like(op, operands), changed)


@in_both
@pytest.mark.parametrize("op", OPS)
def test_permuted_batch(op, dtype):
    """[batch, sequence, K] that is stored sequence first, as some models keep it."""
    operands = helpers.operands(op, (4, 3), N, K, R, dtype)
    dy = helpers.gradient_like(op, operands)
    _agrees_with_exact(op, operands, dy, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))


@in_both
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("m", [0, 1, 7])
def test_expanded_gradient(op, m, dtype):
    """``y.sum()`` sends back one number seen m x n times, with strides of zero."""
    operands = helpers.operands(op, m, N, K, R, dtype)
    dy = torch.ones((), dtype=dtype).expand(m, N)
    _agrees_with_exact(op, operands, dy, lambda x: x)


@in_both
@pytest.mark.parametrize("op", OPS)
def test_expanded_and_transposed_gradient(op, dtype):
    operands = helpers.operands(op, 7, N, K, R, dtype)
    row, column, turned = (torch.randn(*shape).to(dtype) for shape in ((N,), (7, 1), (N, 7)))
    for dy in (row.expand(7, N), column.expand(7, N), turned.t()):
        _agrees_with_exact(op, operands, dy, lambda x: x)


@in_both
@pytest.mark.parametrize("op", OPS)
def test_expanded_x(op, dtype):
    operands = helpers.operands(op, 1, N, K, R, dtype)
    x = operands["x"].expand(5, K)
    addend = {"addend": operands["addend"].expand(5, N)} if op == "linear_add" else {}
    want = helpers.exact(op, operands).expand(5, N)
    for backend in helpers.cpu_backends(op, dtype):
        y = helpers.call(op, operands | {"x": x} | addend, backend=backend)
        torch.testing.assert_close(y, want, **TOLERANCE[dtype], check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_weight_stored_transposed(op, dtype):
    """GPT-2's Conv1D keeps [K, N]: the weight comes as a transposed view."""
    operands = helpers.operands(op, 7, N, K, R, dtype)
    dy = helpers.gradient_like(op, operands)
    turned = operands | {"weight": operands["weight"].t().contiguous().t()}
    for backend in helpers.cpu_backends(op, dtype):
        run = lambda o, given, b=backend: helpers.call(o, given, backend=b)  # noqa: E731
        got = helpers.outcome(run, op, turned, dy)
        helpers.assert_error_bound(op, operands, dy, got)


def test_rank_zero_is_the_frozen_linear():
    for op in ("qr_linear", "lora_xs_linear"):
        operands = helpers.operands(op, 7, N, K, 0)
        dy = helpers.gradient_like(op, operands)
        _agrees_with_exact(op, operands, dy, lambda x: x)


# --- refusals


@pytest.mark.parametrize("op", OPS)
def test_wrong_operands_are_named(op):
    good = helpers.operands(op, 7, N, K, R)
    name = TRAINABLES[op][0]
    cases = [
        ({"x": good["x"][:, :-1]}, ValueError, "x must have 36 features"),
        ({"x": good["x"].long()}, TypeError, "x must be float16"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have 36 features"),
        ({"weight": good["weight"][0]}, ValueError, r"weight must have shape \[N, K\]"),
        ({"weight": good["weight"].double()}, TypeError, "weight must be torch.float32 like x"),
        ({"weight": good["weight"].to("meta")}, ValueError, "weight must be on cpu like x"),
        ({"bias": good["bias"][1:]}, ValueError, r"bias must have shape \[24\], got \[23\]"),
        ({"bias": good["bias"].bfloat16()}, TypeError, "bias must be torch.float32"),
        ({name: good[name].double()}, TypeError, f"{name} must be torch.float32"),
        ({name: good[name].to("meta")}, ValueError, f"{name} must be on cpu"),
        ({name: None}, TypeError, f"{name} must be a torch.Tensor, got NoneType"),
        ({name: good[name][..., None]}, ValueError, f"{name} must have shape"),
    ]
    for changed, error, message in cases:
        with pytest.raises(error, match=message):
            helpers.call(op, good | changed)


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, n) for op in OPS for n in OPERANDS[op] if n not in ("lam", "core", "addend")],
)
def test_wrong_factors_are_named(op, name):
    good = helpers.operands(op, 7, N, K, R)
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        helpers.call(op, good | {name: good[name][:-1]})
    with pytest.raises(TypeError, match=f"{name} must "):
        helpers.call(op, good | {name: good[name].double()})
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor"):
        helpers.call(op, good | {name: "factor"})


def test_kron_ranks_must_divide_and_starts_come_in_pairs():
    good = helpers.operands("kron_linear", 7, N, K, R)
    with pytest.raises(ValueError, match="r dividing N=24 and K=36"):
        helpers.call("kron_linear", good | {"a": torch.randn(5, 5)})
    with pytest.raises(ValueError, match="a0 and b0 must be given together"):
        helpers.call("kron_linear", good | {"b0": None})


@pytest.mark.parametrize("op", ["qr_linear", "lora_xs_linear", "kron_linear"])
def test_scaling_must_be_a_number(op):
    for wrong in ("1", None, True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="scaling must be a float"):
            helpers.call(op, helpers.operands(op, 7, N, K, R), scaling=wrong)


# --- backends


def _problem(op):
    return Problem(op, torch.device("cpu"), torch.float32, 7, N, K, R)


def asked(p, backend):
    return problem_of(p).step, backend


@pytest.mark.parametrize("op", OPS)
def test_a_forced_backend_runs_forward_and_backward(op, monkeypatch):
    for backend in helpers.cpu_backends(op, torch.float32):
        operands = helpers.operands(op, 7, N, K, R)
        operands["x"].requires_grad_()
        seen = []
        original = chooser.run
        monkeypatch.setattr(
            "qrlora_kernels.ops.operator.run",
            lambda *a, seen=seen, original=original: seen.append(asked(*a)) or original(*a),
        )
        helpers.call(op, operands, backend=backend).sum().backward()
        want = [("fwd", backend)] if op == "linear_add" else [("fwd", backend), ("bwd", backend)]
        assert seen == want
        choice = backends.last_choice(op)
        assert (choice.backend, choice.reason) == (backend, "asked for")


@pytest.mark.parametrize("op", OPS)
def test_a_forced_backend_that_cannot_run_raises(op, monkeypatch):
    composed = chooser.load("composed")
    monkeypatch.setattr(composed, "supports", lambda problem: "it is Sunday")
    chooser._choose.cache_clear()
    message = f"backend 'composed' cannot run {op} here: it is Sunday"
    try:
        with pytest.raises(ValueError, match=message):
            helpers.call(op, helpers.operands(op, 7, N, K, R), backend="composed")
        helpers.call(op, helpers.operands(op, 7, N, K, R))
        choice = backends.last_choice(op)
        assert choice.name != "composed"
        assert choice.name == "cpu" or "not composed: it is Sunday" in choice.reason
    finally:
        chooser._choose.cache_clear()


@pytest.mark.parametrize("op", OPS)
def test_unknown_backends_are_named(op, monkeypatch):
    operands = helpers.operands(op, 7, N, K, R)
    with pytest.raises(ValueError, match=r"backend must be one of .*got 'nonsense'"):
        helpers.call(op, operands, backend="nonsense")
    with pytest.raises(ValueError, match="got 'nonsense'"), backends.use_backend("nonsense"):
        pass
    monkeypatch.setenv("QRLORA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="got 'nonsense'"):
        helpers.call(op, operands)


def test_order_of_the_ways_to_force(monkeypatch):
    """The argument, then the block, then the environment; an empty variable is none."""
    monkeypatch.setenv("QRLORA_BACKEND", "reference")
    assert backends.choose(_problem("qr_linear")).name == "reference"
    with backends.use_backend("composed"):
        assert backends.choose(_problem("qr_linear")).name == "composed"
        assert backends.choose(_problem("qr_linear"), "reference").name == "reference"
    monkeypatch.setenv("QRLORA_BACKEND", "")
    unforced = helpers.cpu_backends("qr_linear", torch.float32)[0]
    assert backends.choose(_problem("qr_linear")).name == unforced


def test_a_block_pins_the_backward_that_runs_after_it():
    operands = helpers.operands("qr_linear", 7, N, K, R)
    operands["x"].requires_grad_()
    with backends.use_backend("reference"):
        y = helpers.call("qr_linear", operands)
    y.sum().backward()
    assert backends.last_choice("qr_linear").name == "reference"


def test_a_forced_backend_is_not_replaced_by_the_plain_expression():
    operands = helpers.operands("qr_linear", 7, N, K, R)
    operands["weight"].requires_grad_()
    with pytest.raises(ValueError, match="backend 'composed' cannot run qr_linear here"):
        helpers.call("qr_linear", operands, backend="composed")
    assert helpers.call("qr_linear", operands, backend="reference").requires_grad


def test_report_gives_each_backend_a_reason():
    report = backends.report()
    assert list(report) == list(backends.BACKENDS)
    assert all(isinstance(ok, bool) and reason for ok, reason in report.values())


@pytest.mark.parametrize("op", ["qr_linear", "lora_xs_linear", "kron_linear"])
def test_a_forced_recipe_that_the_backward_does_not_have(op, monkeypatch):
    """In half precision with a bias the forward has one of its own, on a CPU that multiplies."""
    monkeypatch.setattr(products, "multiplies", lambda device, dtype: True)
    monkeypatch.setattr(chooser, "_choose", chooser._choose.__wrapped__)  # kept for none
    operands = helpers.operands(op, 7, N, K, R, torch.bfloat16)
    backend, recipe = ("cpu", "fp32 base") if op == "kron_linear" else ("composed", "fp32")
    if backend not in helpers.cpu_backends(op, torch.bfloat16):
        pytest.skip("needs the native core")
    operands["x"].requires_grad_()
    helpers.call(op, operands, backend=f"{backend}:{recipe}").sum().backward()
    forward, backward = (backends.last_choice(op, step) for step in ("fwd", "bwd"))
    assert (forward.backend, forward.recipe) == (backend, recipe)
    assert backward.backend == backend
    assert backward.recipe == ("native base" if op == "kron_linear" else "addmm")


@pytest.mark.parametrize("step", ["fwd", "bwd"])
def test_an_unknown_recipe_is_named(step):
    problem = joined(Problem("qr_linear", torch.device("cpu"), torch.float32, 7, N, K, R, step))
    message = r"backend must be .*'composed:addmm' for qr_linear.* here, got 'composed:fastest'"
    with pytest.raises(ValueError, match=message):
        backends.choose(problem, "composed:fastest")


@pytest.mark.parametrize("change", [{"op": "nope"}, {"step": "x"}, {"gate": "nope"}], ids=str)
def test_a_problem_that_there_is_none_of_is_refused(change):
    """It was answered as if it were another."""
    problem = Problem("low_rank", torch.device("cpu"), torch.float32, 7, N, K, R)
    with pytest.raises(ValueError, match="problem must be of a known op, gate and step, got"):
        backends.choose(problem._replace(**change))


@pytest.mark.parametrize("gate", ["mixed_vector", "mixed_core"])
def test_the_mixed_function_keeps_its_gate(gate):
    problem = Problem("mixed_low_rank_linear", torch.device("cpu"), torch.float32, 7, N, K, R)
    assert joined(problem._replace(gate=gate)).gate == gate
