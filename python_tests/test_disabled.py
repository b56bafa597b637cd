"""The base's answer while ``disabled``: exact, per thread, nested, compiled, recomputed."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qrlora_kernels as qk

ADAPTERS = {
    "qr": {"rank": 4},
    "lora_xs": {"rank": 4},
    "ohora": {},
    "ohora folded": {"fold": True},
    "qr with dropout": {"rank": 4, "dropout": 0.5},
}


class Conv1D(nn.Module):
    """As GPT-2's: its weight is [K, N]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        size = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Net(nn.Module):
    def __init__(self, recompute=None):
        super().__init__()
        self.up, self.down, self.recompute = nn.Linear(16, 64), nn.Linear(64, 16), recompute

    def _body(self, x):
        return self.down(self.up(x).relu())

    def forward(self, x):
        if self.recompute is None:
            return self._body(x)
        return checkpoint(self._body, x, use_reentrant=self.recompute)


def pair(adapter="qr", dtype=torch.float32, make=Net):
    """An adapted and trained model, and the model that it was."""
    torch.manual_seed(0)
    base = make().to(dtype)
    model = copy.deepcopy(base)
    kind = adapter.split()[0]
    qk.adapt(model, ["up", "down"], kind, progress=False, **ADAPTERS[adapter])
    move(model)
    return model, base


@torch.no_grad()
def move(model):
    for layer in qk.adapted_layers(model).values():
        for name in layer.trainables:
            getattr(layer, name).add_(torch.randn_like(getattr(layer, name)))


def inputs(dtype=torch.float32):
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_the_base_answers_with_its_own_bits(adapter, dtype, train):
    if "fold" in adapter and dtype == torch.bfloat16:
        pytest.skip("refused")
    model, base = pair(adapter, dtype)
    model.train(train), base.train(train)
    x = inputs(dtype)
    with qk.disabled(model) as given:
        assert given is model
        assert torch.equal(model(x), base(x))
    assert not torch.equal(model(x), base(x))


def test_conv1d_answers_with_its_own_bits():
    def make():
        return nn.ModuleDict({"up": Conv1D(64, 16), "down": Conv1D(16, 64)})

    model, base = pair(make=make)
    with qk.disabled(model):
        for x in (inputs(), inputs()[None]):
            assert torch.equal(model["up"](x), base["up"](x))
    assert not torch.allclose(model["up"](inputs()), base["up"](inputs()))


def test_nested_and_left_by_an_exception():
    model, base = pair()
    x = inputs()
    with qk.disabled(model):
        with qk.disabled(model):
            pass
        with pytest.raises(RuntimeError, match="stop"), qk.disabled(model):
            raise RuntimeError("stop")
        assert torch.equal(model(x), base(x))
    assert not torch.equal(model(x), base(x))


def test_contexts_that_end_in_another_order():
    model, base = pair()
    x = inputs()
    first, second = qk.disabled(model), qk.disabled(model)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model(x), base(x))
    second.__exit__(None, None, None)
    assert not torch.equal(model(x), base(x))


def test_two_models_and_copies_are_apart():
    model, base = pair()
    other, x = copy.deepcopy(model), inputs()
    with qk.disabled(model):
        inside = copy.deepcopy(model)
        adapted = other(x)
        assert not torch.equal(adapted, base(x))
        assert torch.equal(inside(x), adapted)
        with qk.disabled(other):
            assert torch.equal(other(x), base(x))
        assert torch.equal(other(x), adapted)
        assert torch.equal(model(x), base(x))


def test_part_of_a_model():
    model, base = pair(make=lambda: nn.Sequential(Net(), Net()))
    x = inputs()
    with qk.disabled(model[0]):
        assert torch.equal(model[0](x), base[0](x))
        assert not torch.equal(model[1](x), base[1](x))


def test_taken_off_inside():
    model, base = pair()
    with qk.disabled(model):
        qk.unload(model, merge=False)
    assert torch.equal(model(inputs()), base(inputs()))


def in_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_another_thread_keeps_its_adapter(backend):
    model, base = pair()
    call = model if backend is None else torch.compile(model, backend=backend)
    x = inputs()
    with torch.no_grad():
        adapted = model(x)
        with qk.disabled(model):
            assert torch.equal(call(x), base(x))
            assert torch.equal(in_thread(lambda: call(x)), adapted)

            def both():
                with qk.disabled(model):
                    return call(x)

            assert torch.equal(in_thread(both), base(x))
            assert torch.equal(call(x), base(x))
        assert torch.equal(call(x), adapted)


@pytest.mark.parametrize(
    ("adapter", "backend", "gradients"),
    [
        ("qr", "eager", True),
        ("qr with dropout", "aot_eager", True),
        ("lora_xs", "aot_eager", False),
        ("ohora", "aot_eager", True),
        ("ohora folded", "eager", False),
    ],
)
def test_compiled_once_for_every_time_that_it_is_off(adapter, backend, gradients):
    model, base = pair(adapter)
    model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = inputs()
    with torch.set_grad_enabled(gradients):
        # A graph computes the start that a fold holds.
        adapted = (compiled if "folded" in adapter else model)(x)
        for _ in range(3 + torch._dynamo.config.recompile_limit):
            assert torch.equal(compiled(x), adapted)
            with qk.disabled(model):
                assert torch.equal(compiled(x), base(x))


def test_compiled_while_it_is_off():
    model, base = pair()
    torch._dynamo.reset()
    x = inputs()
    with qk.disabled(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), base(x))
    assert torch.equal(compiled(x), model(x))


def test_compiled_layers_share_their_graphs():
    model, base = pair(make=lambda: nn.Sequential(*(Net() for _ in range(10))))
    torch._dynamo.reset()
    for block in model:
        block.compile(backend="eager", fullgraph=True)
    x = inputs()
    with torch.no_grad():
        adapted = model(x)
        with qk.disabled(model):
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), adapted)


def gradient(model, x, off=None):
    x = x.clone().requires_grad_()
    if off is None:
        model(x).pow(2).sum().backward()
        return x.grad
    with qk.disabled(off):
        model(x).pow(2).sum().backward()
    return x.grad


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_computes_the_base_again(reentrant, backend):
    model, base = pair(make=lambda: Net(reentrant))
    torch._dynamo.reset()
    call = model if backend is None else torch.compile(model, backend=backend)
    x = inputs()
    assert torch.equal(gradient(call, x, off=model), gradient(base, x))
    assert not torch.equal(gradient(call, x), gradient(base, x))


def test_no_gradient_reaches_what_is_off():
    model, _ = pair()
    with qk.disabled(model):
        y = model(inputs())
    assert not y.requires_grad


def test_an_unadapted_or_merged_model_is_refused():
    model, base = pair()
    with pytest.raises(ValueError, match="must hold adapted layers"), qk.disabled(base):
        pass
    qk.merge(model)
    with pytest.raises(ValueError, match="up must not be merged"), qk.disabled(model):
        pass
