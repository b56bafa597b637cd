"""The three modules as drop-in replacements: the nn.Module side of them."""

from __future__ import annotations

import copy
import pickle

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import qrlora_kernels as qk

MAKERS = {
    "qr": lambda linear, **options: qk.QRLinear.from_linear(linear, 4, **options),
    "lora_xs": lambda linear, **options: qk.LoRAXSLinear.from_linear(linear, 4, **options),
    "ohora": lambda linear, **options: qk.OHoRALinear.from_linear(linear, 4, **options),
}
all_three = pytest.mark.parametrize("kind", MAKERS)
N, K = 48, 32


def base(dtype=torch.float32, conv1d=False, bias=True):
    torch.manual_seed(0)
    layer = Conv1D(N, K) if conv1d else nn.Linear(K, N, bias=bias)
    with torch.no_grad():
        layer.weight.normal_()
        if bias:
            layer.bias.normal_()
    return layer.to(dtype)


def trained(kind, linear=None, size=0.1, **options):
    """An adapted layer whose trainables have moved."""
    layer = MAKERS[kind](base() if linear is None else linear, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in layer.trainables:
            parameter = getattr(layer, name)
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return layer


def tokens(dtype=torch.float32):
    return torch.randn(7, K, generator=torch.Generator().manual_seed(2)).to(dtype)


# --- like nn.Linear


@all_three
def test_has_the_face_of_the_layer_it_replaces(kind):
    linear = base()
    layer = MAKERS[kind](linear)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (K, N)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    text = repr(layer)
    assert f"in_features={K}, out_features={N}, bias=True, rank=4" in text
    assert "merged" not in text
    layer.merge()
    assert "merged" in repr(layer)


@all_three
def test_only_the_adapter_trains(kind):
    layer = MAKERS[kind](base())
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(layer.trainables)
    layer(tokens()).square().sum().backward()
    assert layer.weight.grad is None
    assert all(getattr(layer, name).grad is not None for name in layer.trainables)


@all_three
@pytest.mark.parametrize("bias", [True, False])
def test_constructor_of_nn_linear(kind, bias):
    maker = {"qr": qk.QRLinear, "lora_xs": qk.LoRAXSLinear, "ohora": qk.OHoRALinear}[kind]
    layer = maker(K, N, bias, dtype=torch.float64, rank=4)
    assert layer.weight.shape == (N, K)
    assert layer.weight.dtype == torch.float64
    assert (layer.bias is None) == (not bias)
    assert layer(tokens(torch.float64)).shape == (7, N)


@all_three
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_equal_and_apart(kind, clone, merged):
    layer = trained(kind)
    if merged:
        layer.merge()
    layer.eval()
    other = clone(layer)
    assert helpers.same_bits(other(tokens()), layer(tokens()))
    other.unmerge()
    assert helpers.same_bits(other.weight, base().weight)
    with torch.no_grad():
        getattr(other, other.trainables[0]).zero_()
        other.weight.zero_()
    assert getattr(layer, layer.trainables[0]).abs().max() > 0
    assert layer.weight.abs().max() > 0


@all_three
@pytest.mark.parametrize("merged", [False, True])
def test_state_dict_into_a_freshly_adapted_layer(kind, merged):
    """Strict both ways; a merged layer is unmerged first."""
    layer = trained(kind)
    want = layer(tokens())
    state = layer.state_dict()
    other = MAKERS[kind](base())
    if merged:
        other.merge()
    other.load_state_dict(state, strict=True)
    assert not other.merged
    assert helpers.same_bits(other(tokens()), want)
    assert set(state) == {"weight", "bias", *layer.trainables, *layer.factors}


# --- dtypes and devices


@all_three
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_dtypes_of_a_fresh_layer(kind, dtype):
    """A bf16 number of 1 does not move by a step of 1e-3: trainables start in fp32 at least."""
    layer = MAKERS[kind](base(dtype))
    wide = torch.float32 if dtype in helpers.HALF else dtype
    assert {getattr(layer, name).dtype for name in layer.trainables} == {wide}
    assert layer.weight.dtype == dtype


@all_three
@pytest.mark.parametrize("start", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "double"])
def test_conversions(kind, start, convert):
    """Trainables are fp32 over half-precision weights, of the weight's dtype otherwise."""
    layer = getattr(trained(kind, base(start)), convert)()
    dtype = layer.weight.dtype
    wide = torch.float32 if dtype in helpers.HALF else dtype
    for name in layer.trainables:
        # What was fp32 over a half-precision weight becomes fp64 only with the weight.
        assert getattr(layer, name).dtype == wide
    assert layer(tokens(dtype)).dtype == dtype
    layer(tokens(dtype)).float().square().sum().backward()


@all_three
def test_trainables_keep_their_digits_in_half_precision(kind):
    layer = trained(kind)
    before = {name: getattr(layer, name).clone() for name in layer.trainables}
    layer.bfloat16().float()
    assert all(helpers.same_bits(getattr(layer, n), t) for n, t in before.items())


@all_three
@pytest.mark.parametrize("merged", [False, True])
def test_to_meta_and_back(kind, merged):
    layer = trained(kind)
    if merged:
        layer.merge()
    layer.to("meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer.eval()(tokens().to("meta")).shape == (7, N)
    layer.to_empty(device="cpu").load_state_dict(trained(kind).state_dict())
    assert helpers.same_bits(layer(tokens()), trained(kind)(tokens()))


@all_three
def test_gradients_convert_with_their_parameters(kind):
    layer = trained(kind)
    layer(tokens()).sum().backward()
    layer.bfloat16()
    for name in layer.trainables:
        assert getattr(layer, name).grad.dtype == torch.float32


# --- Conv1D


@all_three
def test_over_conv1d(kind):
    conv = base(conv1d=True)
    linear = base()
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    over_conv, over_linear = trained(kind, conv), trained(kind, linear)
    if kind == "lora_xs":
        over_conv.core.data.copy_(over_linear.core)
    assert over_conv.weight is conv.weight
    assert over_conv.weight.shape == (K, N)
    torch.testing.assert_close(over_conv(tokens()), over_linear(tokens()), rtol=1e-4, atol=1e-4)
    back = over_conv.to_linear(merge=False)
    assert type(back) is Conv1D
    assert back.weight is conv.weight
    torch.testing.assert_close(
        over_conv.to_linear()(tokens()), over_conv(tokens()), rtol=1e-4, atol=1e-4
    )


# --- merge


@all_three
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv1d", [False, True])
def test_unmerge_returns_the_bits(kind, dtype, conv1d):
    linear = base(dtype, conv1d)
    original, bits = linear.weight, linear.weight.clone()
    layer = trained(kind, linear)
    want = layer(tokens(dtype))
    for _ in range(2):
        layer.merge()
        layer.merge()
        assert not helpers.same_bits(layer.weight, bits)
        assert helpers.same_bits(original, bits), "merge wrote into the base weight"
        torch.testing.assert_close(layer.eval()(tokens(dtype)), want, rtol=0.05, atol=0.05)
        layer.unmerge()
        layer.unmerge()
        assert layer.weight is original
        assert helpers.same_bits(layer.weight, bits)
    assert helpers.same_bits(layer(tokens(dtype)), want)


@all_three
def test_unmerge_after_a_conversion(kind):
    layer = trained(kind)
    bits = layer.weight.detach().bfloat16()
    layer.merge()
    layer.bfloat16()
    layer.unmerge()
    assert helpers.same_bits(layer.weight, bits)


@all_three
def test_merged_weight_is_rounded_once(kind):
    layer = trained(kind, base(torch.bfloat16))
    exact = layer.weight.float() + layer.delta_weight()
    layer.merge()
    # Up or down at random, but to a neighbour: less than one spacing away.
    spacing = torch.finfo(torch.bfloat16).eps * exact.abs()
    assert ((layer.weight.float() - exact).abs() <= spacing).all()


@all_three
def test_a_merged_layer_does_not_train(kind):
    layer = trained(kind).train()
    layer.merge()
    with pytest.raises(RuntimeError, match=r"merged layer cannot train.*unmerge"):
        layer(tokens())
    with torch.no_grad():
        layer(tokens())
    assert layer.explain().name == "merged"
    layer.unmerge()
    layer(tokens()).sum().backward()


@all_three
@pytest.mark.parametrize("merged", [False, True])
def test_to_linear(kind, merged):
    linear = base()
    layer = trained(kind, linear).eval()
    want = layer(tokens())
    if merged:
        layer.merge()
    plain = layer.to_linear()
    assert type(plain) is nn.Linear
    assert not plain.training
    torch.testing.assert_close(plain(tokens()), want, rtol=1e-4, atol=1e-4)
    assert plain.weight.data_ptr() not in (layer.weight.data_ptr(), linear.weight.data_ptr())
    off = layer.to_linear(merge=False)
    assert off.weight is linear.weight
    assert helpers.same_bits(off(tokens()), linear(tokens()))


# --- dropout


@all_three
def test_dropout_reaches_dx_and_ends_in_eval(kind):
    """The base sees x, the update a dropped copy, and the same mask is in the gradient of x."""
    layer = trained(kind, base(torch.float64), size=1.0, dropout=0.5)
    x = tokens(torch.float64).requires_grad_()
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones_like(x), 0.5)
    delta = layer.delta_weight()
    torch.testing.assert_close(y, x @ layer.weight.T + layer.bias + (mask * x) @ delta.T)
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ layer.weight + mask * (dy @ delta))
    layer.eval()
    torch.testing.assert_close(layer(x), x @ (layer.weight + delta).T + layer.bias)


@all_three
def test_factors_follow_parameters_that_something_else_moved(kind):
    """As accelerate's dispatch and fully_shard do: they know parameters and buffers alone."""
    layer = trained(kind)
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter.detach().to("meta")))
    assert layer(tokens().to("meta")).shape == (7, N)
    assert all(getattr(layer, name).is_meta for name in layer.factors)
