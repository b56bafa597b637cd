"""Adapters over quantised weights: where they start, what they compute, what they keep."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import update_gain
from quantised_models import (
    ADAPTERS,
    DTYPES,
    KINDS,
    SAME,
    adapt,
    dense,
    linear,
    move,
    net,
    quantise,
    x,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import qrlora_kernels as qk
from qrlora_kernels.functional import low_rank_onto
from qrlora_kernels.nn import ADAPTERS as LAYERS
from qrlora_kernels.nn import base_weight, dequantising, quantised
from qrlora_kernels.nn.become import become, shallow_copy

of_each_kind = pytest.mark.parametrize("kind", KINDS)
of_each_adapter = pytest.mark.parametrize("adapter", ADAPTERS)
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def adapted(kind, adapter, dtype=torch.bfloat16, **options):
    layer = quantise(linear(dtype), kind)
    return layer, LAYERS[adapter].from_linear(layer, **ADAPTERS[adapter] | options)


def twin(layer, dtype):
    """The same adapter over an ordinary layer with the dense weight, in ``dtype``."""
    matrix = base_weight.quantised(layer).dense(dtype)
    plain = nn.Linear(layer.in_features, layer.out_features, dtype=dtype)
    plain.weight = nn.Parameter(matrix)
    plain.bias = nn.Parameter(layer.bias.detach().to(dtype))
    state = {n: getattr(layer, n).detach().clone() for n in (*layer.trainables, *layer.factors)}
    for name in layer.factors:
        if state[name].is_floating_point() and name not in layer.adapter.kept_fp32:
            state[name] = state[name].to(dtype)
    return become(shallow_copy(plain), LAYERS[layer.kind], layer.options, state)


# --- the start


@of_each_kind
@in_each_dtype
def test_the_base_answers_as_its_library_does(kind, dtype):
    """Bit for bit, or no further from fp64 where the library rounds the sum too."""
    layer, own = adapted(kind, "qr", dtype)
    x0 = x(dtype, 33).requires_grad_()
    want = layer(x0)
    with qk.disabled(own):
        got = own(x0)
    assert got.dtype == want.dtype
    if kind in SAME or dtype == torch.float32:
        error = 0 if kind in SAME else 1e-6
        assert (got - want).norm() <= error * want.norm()
        return
    exact = x0.double() @ dense(layer).t() + layer.bias.double()
    assert (got - exact).norm() <= (want - exact).norm()
    assert (got - want).norm() <= 5e-3 * want.norm()


@of_each_kind
@pytest.mark.parametrize("adapter", ["qr", "ohora"])
def test_it_starts_at_the_base(kind, adapter):
    """Within the rounding of one element here and there: kernels sum in another order."""
    layer, own = adapted(kind, adapter)
    want, got = layer(x(tokens=257)), own(x(tokens=257))
    if kind in SAME:
        assert (got != want).float().mean() <= 1e-3
    assert (got.double() - want.double()).norm() <= 5e-3 * want.double().norm()


@of_each_kind
def test_the_start_is_that_of_the_dense_weight(kind):
    layer, own = adapted(kind, "qr", torch.float32)
    other = qk.linalg.pivoted_qr(dense(layer).float(), 6)
    assert torch.equal(own.pivots, other.pivots)
    torch.testing.assert_close(own.q, other.q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "bnb_int8", "int8"])
def test_a_model_is_started_layer_by_layer(kind, monkeypatch):
    """Never more than one dense weight at a time."""
    alive, most = weakref.WeakSet(), 0
    made = base_weight.matrix

    def matrix(*args):
        nonlocal most
        dense = made(*args)
        alive.add(dense)
        gc.collect()
        most = max(most, len(alive))
        return dense

    monkeypatch.setattr(base_weight, "matrix", matrix)
    adapt(net(kind), "lora_xs")
    assert most == 1


# --- forward and backward


@of_each_kind
@of_each_adapter
@in_each_dtype
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}])
def test_it_is_the_adapter_over_the_dense_weight(kind, adapter, dtype, options):
    """Bit for bit, forward and backward, dropout too."""
    _, own = adapted(kind, adapter, dtype, **options)
    move(own)
    other = twin(own, dtype)
    results = []
    for one in (own, other):
        one.train()
        x0 = x(dtype).requires_grad_()
        torch.manual_seed(5)
        y = one(x0)
        y.backward(torch.ones_like(y))
        grads = [getattr(one, n).grad for n in one.trainables]
        results.append((y, x0.grad, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(t.abs().sum() > 0 for t in results[0])


@of_each_kind
@of_each_adapter
@pytest.mark.parametrize("train", [True, False])
def test_training_and_eval_mode_give_the_same(kind, adapter, train):
    _, own = adapted(kind, adapter)
    move(own)
    want = own.train()(x())
    with torch.set_grad_enabled(train):
        assert torch.equal(own.eval()(x()), want)
    assert torch.equal(own.train()(x()), want)


@of_each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16])
def test_under_autocast(kind, dtype, asked):
    layer, own = adapted(kind, "qr", dtype)
    for given in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", asked):
            want, got = layer(x(given)), own(x(given))
            with qk.disabled(own):
                alone = own(x(given))
        assert kind not in SAME or torch.equal(alone, want)
        for one in (alone, got):
            assert (one.float() - want.float()).norm() <= 1e-2 * want.float().norm()
    got.float().sum().backward()
    assert own.lam.grad.abs().sum() > 0


@of_each_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_x_of_another_dtype(kind, dtype):
    layer, own = adapted(kind, "qr", torch.bfloat16)
    move(own)
    x0 = x(dtype).requires_grad_()
    y = own(x0)
    y.sum().backward()
    exact = x0.double() @ (dense(layer) + own.delta_weight().double()).t() + layer.bias.double()
    assert y.dtype == dtype
    assert x0.grad.dtype == dtype
    assert (y - exact).norm() <= 1e-2 * exact.norm()


def test_int8_weights_are_not_rounded_for_an_fp32_input():
    """Of a half-precision model: the library's product of it is that with codes times scales."""
    layer, own = adapted("int8", "qr", torch.bfloat16)
    layer.bias.data = layer.bias.data.float()
    want = layer(x(torch.float32))
    with qk.disabled(own):
        got = own(x(torch.float32))
    assert (got - want).norm() <= 1e-6 * want.norm()


@of_each_kind
@of_each_adapter
def test_a_small_update_survives(kind, adapter):
    """‖ΔW‖ = 1e-4 ‖W‖ in bf16, of which the base's own product plus an update keeps a few %."""
    layer, own = adapted(kind, adapter)
    matrix = dense(layer)
    silent = own.silent()
    with torch.no_grad():
        for name in own.trainables:
            own._parameters[name].copy_(silent[name] + 0.1 * torch.randn_like(silent[name]))
        ratio = own.delta_weight().double().norm() / matrix.norm()
        own.scaling = own.scaling * 1e-4 / float(ratio)
    tokens = x(tokens=8192)
    update = tokens.double() @ own.delta_weight().double().t()
    with torch.no_grad():
        moved = own(tokens)
        own.scaling = 1e-30 * own.scaling
        still = own(tokens)
    assert update_gain(moved, still, update) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("kind", ["bnb_int8", "int8"])
def test_a_small_update_onto_the_product_of_the_library(kind):
    """Which comes unrounded of an fp32 input, without a dense weight."""
    layer, own = adapted(kind, "qr")
    gate = 1e-4 * torch.randn(6)
    tokens = x(tokens=8192)
    update = (tokens.double() @ own.r.double().t() * gate.double()) @ own.q.double().t()
    with torch.no_grad():
        y0 = layer(tokens.float())
        assert y0.dtype == torch.float32
        y = low_rank_onto(y0, tokens, own.r.bfloat16(), own.q.bfloat16(), gate)
        exact = tokens.double() @ dense(layer).t() + layer.bias.double()
        assert (y0 - exact).norm() <= (3e-7 if kind == "bnb_int8" else 3e-3) * exact.norm()
    assert update_gain(y, y0.bfloat16(), update) == pytest.approx(1, abs=0.06)


@of_each_kind
@of_each_adapter
def test_it_trains(kind, adapter):
    torch.manual_seed(0)
    model = adapt(net(kind), adapter, trainable=["head"])
    bits = {n: base_weight.digest(m) for n, m in model.named_modules() if n in ("first", "second")}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    target = torch.arange(33) % 3
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(x(tokens=33)).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert bits == {n: base_weight.digest(model.get_submodule(n)) for n in bits}


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
    assert torch.equal(torch.jit.trace(model, (x(),), check_trace=False)(x()), want)
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


# --- the layer


@of_each_kind
@of_each_adapter
def test_a_copy_answers_alike(kind, adapter):
    model = move(adapt(net(kind), adapter))
    other = copy.deepcopy(model)
    assert torch.equal(other(x()), model(x()))
    move(other)
    assert not torch.equal(other(x()), model(x()))


@of_each_kind
@of_each_adapter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_casts_of_the_model(kind, adapter, dtype):
    model = move(adapt(net(kind), adapter))
    want = model(x())
    bits = (
        base_weight.quantised(model.first)
        .parts()["qdata" if "qdata" in base_weight.quantised(model.first).parts() else ""]
        .clone()
    )
    model = model.to(dtype)
    got = model(x(dtype))
    assert got.dtype == dtype
    assert (got.float() - want.float()).norm() <= 2e-2 * want.float().norm()
    held = quantised.held(model.first.weight)
    assert torch.equal(held, bits)
    assert not model.first.base_changed()


@of_each_kind
def test_taken_off_it_is_the_layer_that_it_was(kind):
    model = net(kind)
    before = {n: type(m) for n, m in model.named_modules()}
    want = model(x())
    adapt(model)
    qk.unload(model, merge=False)
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert torch.equal(model(x()), want)


def test_the_words_of_a_layer():
    _, own = adapted("nf4", "qr")
    assert isinstance(own, qk.QRLinear)
    assert "in_features=64, out_features=96" in repr(own)
    assert own.explain(2048).name
    assert 0 < own.energy_kept() < 1
    assert own.merged is False


@of_each_kind
def test_summary_counts_what_is_there(kind):
    model = adapt(net(kind))
    table = qk.summary(model, show=False)
    row = table.layers[0]
    few = base_weight.quantised(model.first)
    assert row.shape == (96, 64)
    assert row.weight_bytes == sum(t.nbytes for t in few.parts().values())
    assert row.weight_bytes < 2 * 96 * 64
    assert table.parameters["frozen"] >= 2 * 96 * 64


@of_each_kind
def test_refresh_and_another_rank(kind):
    model = move(adapt(net(kind)))
    qk.set_rank(model, 9)
    assert model.first.rank == 9
    qk.refresh(model)
    assert not model.first.lam.any()
    assert torch.isfinite(model(x())).all()


@of_each_kind
@of_each_adapter
def test_rows_of_a_batch_with_adapters_of_their_own(kind, adapter):
    model = adapt(net(kind), adapter)
    bank = qk.AdapterBank(model, capacity=2)
    for name in ("a", "b"):
        bank.add(name)
    with bank.use(["a", "b", "a"]):
        y = model(x().view(3, 3, 64))
    torch.testing.assert_close(y, model(x().view(3, 3, 64)), rtol=2e-2, atol=2e-2)


@of_each_kind
@of_each_adapter
def test_rows_in_another_dtype(kind, adapter):
    """Their numbers are cast as the layer's own are."""
    model = adapt(net(kind), adapter)
    bank = qk.AdapterBank(model, capacity=1)
    bank.add("a")
    rows = x(torch.float64).view(3, 3, 64)
    with bank.use(["a"] * 3):
        y = model.first(rows)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, model.first(rows), rtol=1e-2, atol=1e-2)


def test_quantised_after_it_was_adapted():
    """As torchao's ``quantize_`` does to every nn.Linear; the factors are of the weight before."""
    layer = qk.QRLinear.from_linear(linear(torch.float32), rank=6)
    quantise(layer, "int8")
    assert layer.base_changed()
    assert layer(x(torch.float32)).shape == (9, 96)
    assert dequantising.base(layer, x(torch.float32)).shape == (9, 96)
