"""The operations inside PyTorch: autograd, autocast, checkpointing, torch.func."""

from __future__ import annotations

import weakref

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import OPERANDS, OPS, TRAINABLES
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from qrlora_kernels import backends
from qrlora_kernels.dispatch import chooser

SIZES = (7, 24, 36, 3)


def _leaves(op, operands):
    return [operands[n].requires_grad_() for n in ("x", "bias", *TRAINABLES[op])]


def _close(got, want, rtol=1e-5):
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol, check_dtype=False)


# --- gradients


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    for backend in helpers.cpu_backends(op, torch.float64):
        operands = helpers.operands(op, 5, 6, 9, 3, torch.float64)
        names = ["x", "bias", *TRAINABLES[op]]
        leaves = [operands[n].requires_grad_() for n in names]

        def function(*values, given=operands, names=names, backend=backend):
            return helpers.call(op, given | dict(zip(names, values, strict=True)), backend=backend)

        assert torch.autograd.gradcheck(function, leaves)
        assert backends.last_choice(op).name == backend


@pytest.mark.parametrize("op", OPS)
def test_double_backward_raises(op):
    """The backward is not differentiable, and says so: no wrong second derivative."""
    operands = helpers.operands(op, *SIZES)
    x, *_ = _leaves(op, operands)
    (grad,) = torch.autograd.grad(helpers.call(op, operands).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_frozen_operands_that_ask_get_their_gradient(op):
    """Weight, factors and start are frozen in the layers; elsewhere no gradient may be dropped."""
    operands = helpers.operands(op, *SIZES, torch.float64)
    frozen = ["weight", *(n for n in OPERANDS[op] if n not in TRAINABLES[op])]
    want = {}
    for function in (helpers.exact, helpers.call):
        leaves = {n: operands[n].detach().clone().requires_grad_() for n in frozen}
        function(op, operands | leaves).square().sum().backward()
        for name, leaf in leaves.items():
            _close(leaf.grad, want.setdefault(name, leaf.grad), 1e-9)
    choice = backends.last_choice(op)
    assert choice.name == "reference"
    assert "asks for a gradient" in choice.reason


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wanted", range(4))
def test_nothing_is_computed_that_is_not_asked(op, wanted, monkeypatch):
    """The backend is told which gradients are wanted, and is not called where none is."""
    module = chooser.load("composed")
    flags = []

    name = "kron_bwd" if op == "kron_linear" else "low_rank_bwd"
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda p, recipe: flags.append(p) or original(p, recipe))
    operands = helpers.operands(op, *SIZES)
    names = ["x", "bias", *TRAINABLES[op]]
    name = names[wanted % len(names)]
    operands[name].requires_grad_()
    helpers.call(op, operands, backend="composed").sum().backward()
    assert operands[name].grad is not None
    if op == "linear_add":
        return
    if name == "bias":
        assert not flags
        return
    asked = [n for n in names if n != "bias"]
    (p,) = flags
    assert list(p[-len(asked) :]) == [n == name for n in asked]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_for_backward(op, dtype):
    """h [M, r] for QR-LoRA and LoRA-XS, x alone for Kronecker, nothing of [M, *] for the sum."""
    m, n, k, r = 64, 24, 36, 3
    operands = helpers.operands(op, m, n, k, r, dtype)
    _leaves(op, operands)
    own = {t.data_ptr(): name for name, t in operands.items()}
    saved: list[Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        helpers.call(op, operands)
    fresh = [t for t in saved if t.data_ptr() not in own]
    referred = {own[t.data_ptr()] for t in saved if t.data_ptr() in own}
    size = operands["x"].element_size()
    fresh_bytes = sum(t.numel() * t.element_size() for t in fresh)
    assert fresh_bytes == (m * r * size if op in ("qr_linear", "lora_xs_linear") else 0)
    assert ("x" in referred) == (op == "kron_linear")
    assert "bias" not in referred


@pytest.mark.parametrize("op", ["qr_linear", "lora_xs_linear", "linear_add"])
def test_x_is_free_after_the_forward(op):
    """Not kept in any other way either: the activation before the layer can be reused."""
    operands = helpers.operands(op, *SIZES)
    _leaves(op, operands)
    x = operands.pop("x") * 1.0
    alive = weakref.ref(x)
    y = helpers.call(op, {"x": x, **operands})
    del x
    assert alive() is None
    y.sum().backward()


# --- autocast


@pytest.mark.parametrize("backward_inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("op", OPS)
def test_autocast(op, backward_inside):
    """As F.linear: bf16 out of fp32 in, gradients in the dtypes of the leaves, in both places."""
    operands = helpers.operands(op, 64, 24, 36, 3)
    leaves = _leaves(op, operands)
    with torch.autocast("cpu", torch.bfloat16):
        y = helpers.call(op, operands)
        assert y.dtype == F.linear(operands["x"], operands["weight"]).dtype == torch.bfloat16
        if backward_inside:
            y.float().square().sum().backward()
    if not backward_inside:
        y.float().square().sum().backward()
    exact = helpers.operands(op, 64, 24, 36, 3, torch.float64)
    want = _leaves(op, exact)
    helpers.exact(op, exact).square().sum().backward()
    for leaf, reference in zip(leaves, want, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        error = (leaf.grad - reference.grad).norm() / reference.grad.norm()
        assert float(error) < 0.02


@pytest.mark.parametrize("op", ["qr_linear", "lora_xs_linear", "kron_linear"])
def test_autocast_leaves_the_plain_expression_wide(op):
    """Its fp32 sums recast to bf16 would lose the update: gain .01 where this was measured."""
    operands = helpers.operands(op, 8192, 512, 64, 4, change=1e-4)
    update = operands["x"] @ helpers.delta_weight(op, operands).float().T
    with torch.autocast("cpu", torch.bfloat16):
        base = F.linear(operands["x"], operands["weight"], operands["bias"])
        operands["weight"].requires_grad_()
        y = helpers.call(op, operands).detach()
    assert helpers.update_gain(y, base, update) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("op", OPS)
def test_autocast_leaves_fp64_alone(op):
    operands = helpers.operands(op, *SIZES, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = helpers.call(op, operands)
    _close(y, helpers.exact(op, operands), 1e-12)


# --- checkpointing, torch.func, forward mode


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_checkpointing(op, reentrant):
    operands = helpers.operands(op, *SIZES)
    dy = helpers.gradient_like(op, operands)

    def checkpointed(_, given):
        names, values = zip(*given.items(), strict=True)
        inner = lambda *v: helpers.call(op, dict(zip(names, v, strict=True)))  # noqa: E731
        return checkpoint(inner, *values, use_reentrant=reentrant)

    want = helpers.outcome(helpers.call, op, operands, dy)
    got = helpers.outcome(checkpointed, op, operands, dy)
    assert all(helpers.same_bits(got[name], want[name]) for name in want)


@pytest.mark.parametrize("op", OPS)
def test_torch_func(op):
    operands = helpers.operands(op, *SIZES, torch.float64)
    name = TRAINABLES[op][0]

    def by(function, value, x):
        return function(op, operands | {name: value, "x": x})

    x, value = operands["x"], operands[name]
    for transform in (
        lambda f: torch.func.grad(lambda v: by(f, v, x).square().sum())(value),
        lambda f: torch.func.jacrev(lambda v: by(f, v, x))(value),
        lambda f: torch.func.jacfwd(lambda v: by(f, v, x))(value),
        lambda f: torch.func.vmap(lambda v: by(f, v, x))(torch.stack([value, 2 * value])),
    ):
        _close(transform(helpers.call), transform(helpers.exact), 1e-9)
    assert "torch.func" in backends.last_choice(op).reason


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("tokens", [5, 400])
@pytest.mark.parametrize("op", OPS)
def test_gradients_by_the_batch(op, tokens):
    """``is_grads_batched`` and vmap over ``torch.autograd.grad``, as for Jacobians, run kernels."""
    operands = helpers.operands(op, tokens, *SIZES[1:], torch.float64)
    leaves = _leaves(op, operands)
    y = helpers.call(op, operands)
    dys = torch.randn(3, *y.shape, dtype=y.dtype)

    def gradients(dy: Tensor, **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, dy, retain_graph=True, **options)

    want = [torch.stack(each) for each in zip(*map(gradients, dys), strict=True)]
    for got in (gradients(dys, is_grads_batched=True), torch.func.vmap(gradients)(dys)):
        for one, other in zip(got, want, strict=True):
            _close(one, other, 1e-9)


@pytest.mark.parametrize("op", OPS)
def test_forward_mode(op):
    """A native kernel knows no tangents: the plain expression has to run, or they vanish."""
    operands = helpers.operands(op, *SIZES, torch.float64)
    tangent = torch.randn_like(operands["x"])
    results = {}
    for function in (helpers.call, helpers.exact):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(operands["x"], tangent)
            y = function(op, operands | {"x": dual})
            results[function] = forward_ad.unpack_dual(y).tangent
    _close(results[helpers.call], results[helpers.exact], 1e-9)
