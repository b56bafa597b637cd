"""What trains in full beside the adapter over a half-precision model: it moves, in fp32."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch import nn

import qrlora_kernels as qk

HALF = [torch.float16, torch.bfloat16]


class Head(nn.Module):
    """As transformers' heads for classification: several layers, one name."""

    def __init__(self):
        super().__init__()
        self.dense, self.norm, self.out = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.norm(torch.tanh(self.dense(x))))


class Net(nn.Module):
    """An embedding tied to the output, a body with a norm, and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.body, self.classifier = nn.Linear(16, 16), Head()
        self.out = nn.Linear(16, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        x = self.norm(self.body(self.embed(ids)))
        return self.out(x), self.classifier(x)


def net(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return Net().to(dtype)


IDS = torch.arange(8).reshape(2, 4)
ADAPTERS = {"qr": {"rank": 4}, "lora_xs": {"rank": 4}, "ohora": {}}


def adapt(model, trainable, adapter="qr", **options):
    options = {"progress": False, **ADAPTERS[adapter], **options}
    return qk.adapt(model, ["body"], adapter, trainable=trainable, **options)


def loss_of(model):
    logits, classes = model(IDS)
    return logits.float().pow(2).mean() + classes.float().pow(2).mean()


WHOLE = ["classifier", "classifier.out", "norm", "embed", "out", "body.bias"]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("dtype", HALF)
def test_it_is_kept_in_fp32_and_the_model_computes_as_before(dtype, name):
    model = net(dtype)
    before = model(IDS)
    adapt(model, [name])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 1
    assert {p.dtype for p in trained.values()} == {torch.float32}
    for y, was in zip(model(IDS), before, strict=True):
        assert y.dtype == dtype
        torch.testing.assert_close(y, was, atol=0.02, rtol=0.02)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}


@pytest.mark.parametrize("name", WHOLE)
def test_grad_scaler_takes_its_gradients(name):
    """In fp16 it ended in "Attempting to unscale FP16 gradients"."""
    model = adapt(net(torch.float16), [name])
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(trained, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(p, was) for p, was in zip(trained, before, strict=True))


@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.parametrize("name", ["classifier", "body.bias", "embed"])
def test_small_steps_in_bf16_all_move_it(name, adapter):
    """At a rate of 1e-5 nine of ten numbers stood still."""
    model = adapt(net(), [name], adapter)
    parameters = dict(model.named_parameters())
    key = "classifier.out.weight" if name == "classifier" else name
    chosen = parameters.get(key, parameters.get(f"{key}.weight"))
    before = chosen.detach().clone()
    optimizer = torch.optim.AdamW([chosen], 1e-5, weight_decay=0.0)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
    moved = chosen.detach() != before
    used = torch.ones_like(moved) if name != "embed" else chosen.grad != 0
    assert moved[used].float().mean() > 0.99


@pytest.mark.parametrize("names", [["classifier", "norm", "body.bias"], ["embed"], ["out"]])
@pytest.mark.parametrize("target", [*HALF, torch.float64])
@pytest.mark.parametrize("start", [torch.float32, *HALF])
def test_the_model_is_cast_after_adapt(start, target, names):
    """What trains stays wide under half, follows to fp64, and the model's dtype is right."""
    model = adapt(net(start), names)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1e-5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer_sees = dict(model.named_parameters())
    model.to(target)
    wide = torch.float64 if target == torch.float64 else torch.float32
    for name, p in model.named_parameters():
        assert p is optimizer_sees[name]
        assert p.dtype == (wide if name in trained else target), name
        if name in trained:
            assert torch.equal(p.float(), before[name]), name
    y = model(IDS)
    assert {t.dtype for t in y} == {target}
    loss_of(model).backward()
    model.to(torch.float32)
    assert {t.dtype for t in model(IDS)} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to("cpu"),
        lambda m: m.share_memory(),
        lambda m: m.apply(lambda part: None),
        lambda m: m._apply(torch.clone),
        lambda m: m.to("cpu", torch.bfloat16),
    ],
)
def test_the_model_is_moved_after_adapt(move):
    """A move leaves a wide tensor as it is, and so does a cast to fp32: they are told apart."""
    model = adapt(net(), ["classifier", "body.bias", "embed"])
    before = model(IDS)
    move(model)
    assert all(torch.equal(y, was) for y, was in zip(model(IDS), before, strict=True))
    assert model.classifier.out.weight.dtype == torch.float32
    model.float()
    assert {t.dtype for t in model(IDS)} == {torch.float32}


@pytest.mark.parametrize("target", [torch.float32, torch.float16])
def test_unload_gives_the_dtype_that_the_model_has_by_then(target):
    model = net()
    before = set(vars(model.classifier))
    adapt(model, ["classifier", "body.bias", "embed"]).to(target)
    qk.unload(model)
    assert {p.dtype for p in model.parameters()} == {target}
    assert {t.dtype for t in model(IDS)} == {target}
    assert vars(model.classifier).keys() == before
    assert not model.classifier._forward_pre_hooks
    assert not model.classifier._forward_hooks


def test_another_dtype_can_be_asked_for():
    model = adapt(net(), ["classifier", "body.bias"], head_dtype=torch.bfloat16)
    assert model.classifier.out.weight.dtype == model.body.bias.dtype == torch.bfloat16
    model = adapt(net(), ["classifier", "body.bias"], head_dtype=torch.float64)
    assert model.classifier.out.weight.dtype == model.body.bias.dtype == torch.float64
    assert {t.dtype for t in model(IDS)} == {torch.bfloat16}
    for wrong in (torch.int32, "float32", None):
        with pytest.raises(TypeError, match="head_dtype must be a floating"):
            adapt(net(), ["classifier"], head_dtype=wrong)


@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16])
def test_autocast(start):
    """Of an fp32 model nothing changes; of a half one its results keep their dtype."""
    model = net(start)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(IDS)
        adapt(model, ["classifier", "norm", "body.bias"])
        after = model(IDS)
        loss_of(model).backward()
    for y, was in zip(after, before, strict=True):
        assert y.dtype == was.dtype
        torch.testing.assert_close(y, was, atol=0.03, rtol=0.03)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["classifier", "body.bias"])
def test_compiled(name):
    model = adapt(net(), [name])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for y, want in zip(compiled(IDS), model(IDS), strict=True):
        assert torch.equal(y, want)
    loss_of(compiled).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def again(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, again])
def test_a_copy_keeps_its_own_wide(copied):
    model = adapt(net(), ["classifier", "body.bias"])
    other = copied(model)
    other.to(torch.float16)
    assert other.classifier.out.weight.dtype == other.body.bias.dtype == torch.float32
    assert {t.dtype for t in other(IDS)} == {torch.float16}
    assert {t.dtype for t in model(IDS)} == {torch.bfloat16}
    other.double()
    assert model.classifier.out.weight.dtype == torch.float32
    assert other.classifier.out.weight.dtype == torch.float64


def test_two_calls_with_heads_that_overlap():
    model = adapt(net(), ["classifier.out"])
    qk.adapt(model, ["classifier.dense"], rank=4, trainable=["classifier.norm"], progress=False)
    qk.adapt(model, re.compile("out"), rank=4, trainable=["norm", "classifier.out"], progress=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {t.dtype for t in model(IDS)} == {torch.bfloat16}


def test_a_merged_layer_and_its_plain_copy_with_a_trained_bias():
    model = adapt(net(), ["body.bias"])
    with torch.no_grad():
        model.body.lam.normal_()
    x = torch.randn(3, 16).bfloat16()
    plain = model.body.to_linear()
    assert plain.bias.dtype == torch.bfloat16
    assert model.body.bias.dtype == torch.float32
    qk.merge(model.eval())
    assert torch.equal(model.body(x), plain(x))
    with qk.disabled(qk.unmerge(model)):
        assert model.body(x).dtype == torch.bfloat16


def test_single_parameters_of_a_module_are_named_as_left_in_half():
    with pytest.warns(UserWarning, match=r"classifier\.norm\.bias train in half precision"):
        model = adapt(net(), ["classifier.norm.bias"])
    assert {t.dtype for t in model(IDS)} == {torch.bfloat16}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(net(torch.float32), ["classifier.norm.bias"])


def test_running_statistics_are_wide_beside_their_weights():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).bfloat16()
    qk.adapt(model, ["0"], rank=4, trainable=["1"], progress=False)
    before = model[1].running_mean.clone()
    assert model(torch.randn(64, 8).bfloat16()).dtype == torch.bfloat16
    assert before.dtype == model[1].running_mean.dtype == torch.float32
    assert not torch.equal(model[1].running_mean, before)
    assert model[1].num_batches_tracked.dtype == torch.int64
