"""The same adapters as PEFT's, over quantised bases."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from quantised_models import KINDS, SAME, dense, library, net, quantise, x
from torch import nn

peft = pytest.importorskip("peft", reason="peft is not installed")
import qrlora_kernels.peft as qkp  # noqa: E402
from qrlora_kernels.nn import base_weight  # noqa: E402

CONFIGS = {
    "qr": (qkp.QRLoraConfig, {"r": 6}),
    "lora_xs": (qkp.LoraXSConfig, {"r": 6}),
    "ohora": (qkp.OHoraConfig, {}),
}
of_each_kind = pytest.mark.parametrize("kind", KINDS)
of_each_adapter = pytest.mark.parametrize("adapter", CONFIGS)


def config(adapter, **options):
    kind, own = CONFIGS[adapter]
    return kind(target_modules=["first", "second"], **own | options)


def adapted(kind, adapter="qr", dtype=torch.bfloat16, **options):
    return peft.get_peft_model(net(kind, dtype), config(adapter, **options))


def move_peft(model):
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model


@of_each_kind
@pytest.mark.parametrize("adapter", ["qr", "ohora"])
def test_it_starts_at_the_base(kind, adapter):
    want = net(kind)(x())
    model = adapted(kind, adapter)
    got = model(x())
    assert (got.double() - want.double()).norm() <= 1e-2 * want.double().norm()
    with model.disable_adapter():
        alone = model(x())
    if kind in SAME:
        assert torch.equal(alone, want)


@of_each_kind
@of_each_adapter
def test_it_is_the_adapter_over_the_dense_weight(kind, adapter):
    model = move_peft(adapted(kind, adapter))
    layer = model.base_model.model.first
    exact = dense(layer.base_layer) + layer.get_delta_weight("default").double()
    want = x().double() @ exact.t() + layer.base_layer.bias.double()
    x0 = x().requires_grad_()
    y = layer(x0)
    assert (y.double() - want).norm() <= 5e-3 * want.norm()
    y.sum().backward()
    torch.testing.assert_close(x0.grad.double()[0], exact.sum(0), rtol=5e-2, atol=5e-2)
    assert torch.equal(layer.eval()(x()), y)


@of_each_kind
def test_a_small_update_survives(kind):
    """The base's own product plus an update would keep a few % of it."""
    model = move_peft(adapted(kind))
    layer = model.base_model.model.first
    ratio = layer.get_delta_weight("default").double().norm() / dense(layer.base_layer).norm()
    layer.scaling["default"] *= 1e-4 / float(ratio)
    tokens = x(tokens=8192)
    update = tokens.double() @ layer.get_delta_weight("default").double().t()
    with torch.no_grad():
        moved = layer(tokens).double()
        layer.scaling["default"] *= 1e-30
        difference = moved - layer(tokens).double()
    assert float((difference * update).sum() / update.square().sum()) == pytest.approx(1, abs=0.06)


@of_each_kind
@of_each_adapter
def test_it_is_saved_and_comes_back(kind, adapter, tmp_path):
    model = move_peft(adapted(kind, adapter))
    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(net(kind), tmp_path)
    assert torch.equal(other(x()), model(x()))
    with pytest.raises(ValueError, match="another base weight"):
        peft.PeftModel.from_pretrained(net(kind, seed=1), tmp_path)


@of_each_kind
def test_scales_count(kind, tmp_path):
    model = move_peft(adapted(kind))
    model.save_pretrained(tmp_path)
    other = net(kind)
    parts = base_weight.quantised(other.second).parts()
    with torch.no_grad():
        next(parts[n] for n in ("absmax", "SCB", "scale") if n in parts).view(-1)[3:4].mul_(2)
    with pytest.raises(ValueError, match="another base weight"):
        peft.PeftModel.from_pretrained(other, tmp_path)


@of_each_kind
def test_merging_is_refused_with_the_way_out(kind):
    model = move_peft(adapted(kind))
    want = model(x())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"weight must be dense to be merged.*dequantise"):
            merge()
    assert torch.equal(model(x()), want)


@of_each_kind
def test_merged_over_a_base_that_was_dequantised(kind):
    """As dequantize() of a transformers model does: another layer in the base's place."""
    model = move_peft(adapted(kind))
    want = model(x())
    for name in ("first", "second"):
        layer = getattr(model.base_model.model, name)
        few = layer.base_layer
        plain = nn.Linear(few.in_features, few.out_features, dtype=torch.bfloat16)
        plain.weight = nn.Parameter(dense(few).bfloat16(), requires_grad=False)
        plain.bias = few.bias
        layer.base_layer = plain
    merged = model.merge_and_unload()
    assert type(merged.first) is nn.Linear
    assert (merged(x()).double() - want.double()).norm() <= 2e-2 * want.double().norm()


@of_each_kind
@of_each_adapter
def test_several_adapters_and_rows_of_them(kind, adapter):
    model = move_peft(adapted(kind, adapter))
    model.add_adapter("other", config(adapter))
    model.eval()
    rows = x().view(3, 3, 64)
    one = model(rows)
    model.set_adapter("other")
    two = model(rows)
    mixed = model(rows, adapter_names=["default", "other", "default"])
    want = torch.stack((one[0], two[1], one[2]))
    torch.testing.assert_close(mixed, want, rtol=2e-2, atol=2e-2)
    wide = rows.double()  # whose numbers are cast as a single adapter's are
    layer = model.base_model.model.first
    names = ["other"] * 3
    torch.testing.assert_close(layer(wide, adapter_names=names), layer(wide), rtol=1e-2, atol=1e-2)


@of_each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_casts_and_copies(kind, dtype):
    model = move_peft(adapted(kind))
    want = model(x())
    other = copy.deepcopy(model).to(dtype)
    got = other(x(dtype))
    assert got.dtype == dtype
    assert (got.double() - want.double()).norm() <= 2e-2 * want.double().norm()
    assert torch.equal(model(x()), want)


@of_each_kind
def test_it_trains(kind):
    model = adapted(kind, modules_to_save=["head"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    target = torch.arange(33) % 3
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x(tokens=33)).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_one_dense_weight_at_a_time(monkeypatch):
    import gc
    import weakref

    alive, most = weakref.WeakSet(), 0
    made = base_weight.matrix

    def matrix(*args):
        nonlocal most
        one = made(*args)
        alive.add(one)
        gc.collect()
        most = max(most, len(alive))
        return one

    monkeypatch.setattr(base_weight, "matrix", matrix)
    adapted("nf4", "lora_xs")
    assert most == 1


def test_no_call_repacks_the_weight():
    library("bitsandbytes")
    model = adapted("nf4").eval()
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.base_layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        model(x())
        with model.disable_adapter():
            model(x())
    few = model.base_model.model.first.base_layer.weight
    assert not getattr(few.quant_state, "packing_format_for_cpu", False)


def test_a_base_that_was_repacked_is_refused():
    layer = nn.Sequential(quantise(nn.Linear(64, 96, dtype=torch.bfloat16), "nf4"))
    weight = layer[0].weight
    pack = library("bitsandbytes").functional._convert_weight_packed_for_cpu
    weight.data, weight.quant_state = pack(weight.data, weight.quant_state)
    with pytest.raises(ValueError, match=r"repacked .* load the model again"):
        peft.get_peft_model(layer, qkp.QRLoraConfig(r=4, target_modules=["0"]))


def test_a_bank_over_it():
    import qrlora_kernels as qk

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted("int8")
    bank = qk.AdapterBank(model, capacity=2)
    bank.add("a")
    with bank.use(["a"] * 3):
        y = model(x().view(3, 3, 64))
    torch.testing.assert_close(y, model(x().view(3, 3, 64)), rtol=2e-2, atol=2e-2)
    layer, wide = model.base_model.model.first, x(torch.float64).view(3, 3, 64)
    with bank.use(["a"] * 3):
        y = layer(wide)
    torch.testing.assert_close(y, layer(wide), rtol=1e-2, atol=1e-2)
