"""Starts that can never train are refused; a start is made again where the weight changed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import qrlora_kernels as qk

ADAPTERS = {"qr": {"rank": 3}, "lora_xs": {"rank": 3}, "ohora": {}}
CLASSES = {"qr": qk.QRLinear, "lora_xs": qk.LoRAXSLinear, "ohora": qk.OHoRALinear}


def x() -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def zero(n: int = 16, k: int = 8) -> nn.Linear:
    linear = nn.Linear(k, n)
    nn.init.zeros_(linear.weight)
    return linear


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def trains(layer: nn.Module) -> bool:
    """Whether some step of gradient descent moves what the layer computes."""
    layer.train()
    for _ in range(2):
        layer.zero_grad()
        (layer(x()) - 1).square().sum().backward()
        if any(getattr(layer, name).grad.any() for name in layer.trainables):
            return True
    return False


# --- K


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_weight_of_zeros_is_refused_by_name_and_can_be_skipped(adapter):
    with pytest.raises(ValueError, match=r"linear\.weight"):
        CLASSES[adapter].from_linear(zero(), **ADAPTERS[adapter])
    model = nn.Sequential(nn.Linear(8, 16), zero(8, 16))
    with pytest.raises(ValueError, match=r"1\.weight"):
        qk.adapt(model, ["0", "1"], adapter, progress=False, **ADAPTERS[adapter])
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    qk.adapt(model, ["0", "1"], adapter, skip=["1"], progress=False, **ADAPTERS[adapter])
    assert list(qk.adapted_layers(model)) == ["0"]
    assert trains(model[0])


@pytest.mark.parametrize(
    "options",
    [
        {"sigma": "in"},
        {"sigma": "out"},
        {"sigma": "split"},
        {"vectors": "middle"},
        {"vectors": "bottom"},
        {"basis": "random_svd"},
    ],
)
def test_lora_xs_of_zeros_with_every_option(options):
    with pytest.raises(ValueError, match="never trains"):
        qk.LoRAXSLinear.from_linear(zero(), 3, **options)


def test_lora_xs_of_zeros_whose_basis_needs_no_weight_trains():
    for options in ({"sigma": "none"}, {"basis": "random"}):
        assert trains(qk.LoRAXSLinear.from_linear(zero(), 3, **options))


def test_a_weight_of_low_rank_at_its_bottom_is_refused():
    """Its smallest singular values are zero: Σ on either side leaves nothing."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 16, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[0] = torch.randn(8)
    with pytest.raises(ValueError, match="never trains"):
        qk.LoRAXSLinear.from_linear(linear, 2, vectors="bottom")


def test_numbers_too_small_for_the_dtype_are_zeros_too():
    linear = nn.Linear(8, 16).half()
    nn.init.constant_(linear.weight, 6e-8)  # the factors that come from it round to zero or nearly
    for adapter, options in (("lora_xs", {"rank": 1}), ("qr", {"rank": 1})):
        try:
            layer = CLASSES[adapter].from_linear(linear, **options)
        except ValueError:
            continue
        assert layer.adapter.can_train({n: getattr(layer, n) for n in layer.factors})


@pytest.mark.parametrize("columns", ["leading", "selected"])
@pytest.mark.parametrize("start", ["qr", "svd", "random", "kaiming"])
def test_any_start_of_ohora_trains_or_is_refused(start, columns):
    refused = 0
    for seed in range(6):
        torch.manual_seed(seed)
        linear = nn.Linear(8, 16)
        try:
            layer = qk.OHoRALinear.from_linear(linear, columns=columns, start=start, seed=seed)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match=r"linear\.weight .*(never trains|than zero)"):
                qk.OHoRALinear.from_linear(linear, columns=columns, start=start, seed=seed)
        else:
            assert trains(layer)
    assert refused < 6


@pytest.mark.parametrize("product", ["kron", "materialised", "lora"])
def test_ohora_of_zeros_is_refused_for_every_product(product):
    with pytest.raises(ValueError, match="weight"):
        qk.OHoRALinear.from_linear(zero(), product=product)


# --- R


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_checkpoint_loaded_after_adapt_is_noticed_and_refreshed(adapter, tmp_path):
    torch.manual_seed(5)
    pretrained = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    want = qk.adapt(
        nn.Sequential(*map(_copy, pretrained)),
        ["0", "2"],
        adapter,
        progress=False,
        **ADAPTERS[adapter],
    )
    model = qk.adapt(net(), ["0", "2"], adapter, progress=False, **ADAPTERS[adapter])
    held = [getattr(model[0], name) for name in model[0].trainables]
    model.load_state_dict(pretrained.state_dict(), strict=False)
    assert model[0].base_changed()
    with pytest.warns(UserWarning, match=r"0, 2 were changed.*qk\.refresh"):
        qk.save_adapter(model, tmp_path / "old.safetensors")
    torch.manual_seed(7)
    assert qk.refresh(model) is model
    assert all(getattr(model[0], n) is p for n, p in zip(model[0].trainables, held, strict=True))
    assert not model[0].base_changed()
    for name in want[0].factors:
        assert torch.equal(getattr(model[0], name), getattr(want[0], name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qk.save_adapter(model, tmp_path / "new.safetensors")
        loaded = qk.load_adapter(
            nn.Sequential(*map(_copy, pretrained)), tmp_path / "new.safetensors"
        )
    assert torch.equal(loaded(x()), model(x()))


def _copy(module: nn.Module) -> nn.Module:
    other = type(module)(*((module.in_features, module.out_features) if _is(module) else ()))
    other.load_state_dict(module.state_dict())
    return other


def _is(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def test_a_refresh_that_fails_leaves_everything_as_it_was():
    model = qk.adapt(net(), ["0", "2"], rank=3, progress=False).eval()
    with torch.no_grad():
        model[0].lam.fill_(0.5)
    qk.merge(model)
    y = model(x())
    model[2]._merge.original.data.zero_()
    with pytest.raises(ValueError, match=r"2\.weight"):
        qk.refresh(model)
    assert model[0].merged
    assert torch.equal(model(x()), y)
    assert model[0].lam[0] == 0.5


def test_a_refresh_of_another_rank_makes_new_parameters():
    """Chosen by a threshold, the rank follows the weight."""
    model = qk.adapt(net(), ["0"], tau=0.5, progress=False)
    with torch.no_grad():
        u, _, v = torch.linalg.svd(model[0].weight, full_matrices=False)
        model[0].weight.copy_(u[:, :2] * torch.tensor([5.0, 4.0]) @ v[:2])
    rank = model[0].rank
    qk.refresh(model)
    assert model[0].rank <= 2 < rank
    assert model[0].q.shape == (16, model[0].rank)
    model(x()).sum().backward()
    assert model[0].lam.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_refresh_after_a_cast_is_a_start_in_the_new_dtype(dtype):
    model = qk.adapt(net(), ["0"], "lora_xs", rank=3, progress=False).to(dtype)
    qk.refresh(model)
    want = qk.adapt(net().to(dtype), ["0"], "lora_xs", rank=3, progress=False)
    assert model[0].a.dtype == dtype
    assert torch.equal(model[0].a, want[0].a)
    assert torch.equal(model[0].b, want[0].b)


def test_a_refresh_of_a_merged_model_starts_from_its_base():
    model = qk.adapt(net(), ["0"], rank=3, progress=False).eval()
    with torch.no_grad():
        model[0].lam.fill_(0.5)
    qk.refresh(qk.merge(model))
    assert not model[0].merged
    assert torch.equal(model[0].weight, net()[0].weight)
    assert not model[0].lam.any()
    assert torch.equal(model[0].q, qk.adapt(net(), ["0"], rank=3, progress=False)[0].q)


def test_a_refresh_keeps_the_strength():
    model = qk.adapt(net(), ["0"], rank=3, progress=False)
    qk.scale(model, 0.5)
    model[0].scaling = 3.0
    qk.refresh(model)
    assert model[0].options.strength == 0.5
    assert model[0].scaling == 3.0


# --- cases 07 and 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", [qk.merge, qk.unload])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_not_finite_is_not_merged_and_every_weight_stays(adapter, call, value):
    model = qk.adapt(net(), ["0", "2"], adapter, progress=False, **ADAPTERS[adapter])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    name = model[2].trainables[0]
    with torch.no_grad():
        getattr(model[2], name).fill_(value)
    with pytest.raises(ValueError, match=r"2: W \+ ΔW must be finite"):
        call(model)
    assert not model[0].merged
    assert all(isinstance(model[i], qk.nn.AdapterLinear) for i in (0, 2))
    for key, p in model.named_parameters():
        assert key == f"2.{name}" or torch.equal(p, before[key])
    with pytest.raises(ValueError, match="must be finite"):
        model[2].to_linear()


def test_an_overflow_of_the_dtype_is_not_merged():
    model = qk.adapt(net().half(), ["0"], rank=3, progress=False)
    with torch.no_grad():
        model[0].lam.fill_(3e38)
    with pytest.raises(ValueError, match=r"0: W \+ ΔW must be finite in torch\.float16"):
        qk.merge(model)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_taken_off_what_trained_before_trains_again(merge, again):
    model = net()
    model.append(nn.LayerNorm(8))
    model[3].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    qk.adapt(model, ["0"], rank=3, trainable=["3"], progress=False)
    if again:
        qk.adapt(model, ["2"], "lora_xs", rank=3, progress=False)
    qk.unload(model, merge=merge)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    qk.adapt(model, ["0"], rank=3, progress=False)  # a first call again
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.lam"]
