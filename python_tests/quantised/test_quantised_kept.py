"""Adapters over quantised weights: what they keep, and who else calls them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from quantised_models import (
    ADAPTERS,
    adapt,
    adapted,
    move,
    net,
    of_each_adapter,
    of_each_kind,
    x,
)
from torch.utils.checkpoint import checkpoint

import qrlora_kernels as qk
from qrlora_kernels.nn import base_weight

# --- what is kept


def _saved(run):
    """What autograd keeps of ``run``: tensors, seen from a hook around everything."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = run()
    return y, kept


@pytest.fixture
def only_new_garbage():
    """The collector leaves alone what is there, whose traversal takes most of its time."""
    gc.freeze()
    yield
    gc.unfreeze()


@of_each_kind
@of_each_adapter
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}])
@pytest.mark.usefixtures("only_new_garbage")
def test_no_dense_weight_is_kept_for_the_backward(kind, adapter, options, monkeypatch):
    _, own = adapted(kind, adapter, **options)
    own.train()
    made, dense_of = [], type(base_weight.quantised(own)).dense

    def dense(self, dtype):
        one = dense_of(self, dtype)
        made.append(weakref.ref(one.untyped_storage()))
        return one

    monkeypatch.setattr(type(base_weight.quantised(own)), "dense", dense)
    x0 = x().requires_grad_()
    y, kept = _saved(lambda: own(x0))
    assert len(made) == 1
    assert not any(t.shape in (own.weight.shape, (96, 64), (64, 96)) for t in kept)
    gc.collect()
    assert made[0]() is None
    y.sum().backward()
    assert len(made) == 2
    del y
    gc.collect()
    assert made[1]() is None


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@of_each_adapter
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(kind, adapter, reentrant):
    _, own = adapted(kind, adapter)
    move(own)

    def gradients(call):
        own.zero_grad()
        x0 = x().requires_grad_()
        y = call(x0)
        y.backward(torch.ones_like(y))
        return (y, x0.grad, *(getattr(own, n).grad.clone() for n in own.trainables))

    want = gradients(own)
    got = gradients(lambda x0: checkpoint(own, x0, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_hooks_around_it_see_what_else_is_kept():
    """As offloading of activations needs: h, and in OHoRA's case x."""
    for adapter in ADAPTERS:
        _, own = adapted("nf4", adapter)
        y, kept = _saved(lambda own=own: own(x().requires_grad_()))
        assert len(kept) >= 3
        y.sum().backward()


@of_each_kind
def test_where_no_hooks_are_allowed(kind):
    """Autograd keeps the dense weight then, as under the transforms of torch.func."""
    _, own = adapted(kind, "qr")
    wanted, got = (x().requires_grad_() for _ in range(2))
    own(wanted).sum().backward()
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks"):
        own(got).sum().backward()
    assert torch.equal(got.grad, wanted.grad)


@of_each_kind
def test_compiled_in_one_graph(kind):
    _, own = adapted(kind, "qr")
    move(own)
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    got = compiled(x())
    torch.testing.assert_close(got, own(x()), rtol=1e-2, atol=1e-2)
    got.sum().backward()
    assert own.lam.grad.abs().sum() > 0


@of_each_kind
def test_whoever_else_calls_it(kind):
    model = move(adapt(net(kind)))
    want = model(x())
    with torch.inference_mode():
        assert torch.equal(model(x()), want)
    traced = torch.jit.trace(model, (x(),), check_trace=False)(x())  # by operators, not kernels
    torch.testing.assert_close(traced, want, rtol=2e-2, atol=2e-2)
    x0 = x().requires_grad_()
    model(x0).float().sum().backward()
    found = torch.func.grad(lambda x0: model(x0).float().sum())(x())
    torch.testing.assert_close(found, x0.grad, rtol=5e-2, atol=5e-2)
    assert model(x()[:0]).shape == (0, 3)


@pytest.mark.parametrize("kind", ["nf4", "bnb_int8", "int4_groups"])
def test_exported(kind):
    model = move(adapt(net(kind))).eval()
    if kind == "int4_groups":
        exported = torch.export.export(model, (x(),)).module()
        assert torch.equal(exported(x()), model(x()))
        return
    with pytest.raises(TypeError, match=r"weight must be the quantised one.*torch\.export"):
        torch.export.export(model, (x(),))


@of_each_kind
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(2, 63).bfloat16(), "x must have 64 features"),
        (torch.ones(2, 64, dtype=torch.int64), "x must be float16"),
        (torch.ones(2, 64).to(torch.float8_e4m3fn), "x must be float16"),
        ([1.0], "x must be a torch.Tensor, got list"),
        (None, "x must be a torch.Tensor, got NoneType"),
    ],
)
def test_an_x_that_does_not_fit_is_named(kind, wrong, message):
    _, own = adapted(kind, "qr")
    with pytest.raises((TypeError, ValueError), match=message):
        own(wrong)
    if "features" not in message:
        with qk.disabled(own), pytest.raises(TypeError, match=message):
            own(wrong)


@pytest.mark.parametrize("kind", ["nf4", "bnb_int8", "int8"])
def test_no_dense_weight_is_kept_by_prepack(kind):
    model = adapt(net(kind))
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x())
        assert torch.equal(qk.prepack(model)(x()), want)
    assert all(m.derived.nbytes() == {} for m in (model.first, model.second))
    plain = net(kind)
    before = type(plain.first)
    qk.prepack(plain.requires_grad_(False))
    assert type(plain.first) is before
