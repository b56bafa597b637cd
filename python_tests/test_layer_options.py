"""The options of the three layers: what each changes, and what is refused."""

from __future__ import annotations

import copy
import functools

import helpers
import pytest
import torch
from test_layers import K, N, base, tokens, trained
from torch import nn
from transformers.pytorch_utils import Conv1D

import qrlora_kernels as qk

# --- LoRA-XS


def _xs(**options):
    torch.manual_seed(3)
    return qk.LoRAXSLinear.from_linear(base(torch.float64), 4, **options)


def test_core_starts_gaussian_with_the_given_deviation():
    torch.manual_seed(0)
    linear = nn.Linear(128, 128)
    assert float(qk.LoRAXSLinear.from_linear(linear, 64).core.std()) == pytest.approx(1e-5, rel=0.1)
    wide = qk.LoRAXSLinear.from_linear(linear, 64, init_std=0.5)
    assert float(wide.core.std()) == pytest.approx(0.5, rel=0.1)
    assert not _xs(init_std=0.0).core.any()
    torch.manual_seed(1)
    first = _xs().core
    assert helpers.same_bits(first, _xs().core), "the core follows PyTorch's global generator"


def test_sides_of_sigma():
    """Σ on the input, the output, half on each, or nowhere: the product of the sides tells."""
    sides = {side: _xs(sigma=side) for side in ("in", "out", "split", "none")}
    s = torch.linalg.svdvals(base(torch.float64).weight)[:4]
    norms = {side: (m.a.norm(dim=1), m.b.norm(dim=0)) for side, m in sides.items()}
    one = torch.ones_like(s)
    for side, want in {
        "in": (s, one),
        "out": (one, s),
        "split": (s.sqrt(), s.sqrt()),
        "none": (one, one),
    }.items():
        torch.testing.assert_close(norms[side], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("basis", ["random_svd", "random"])
def test_random_bases_follow_the_seed_and_not_the_weight(basis):
    same, other = _xs(basis=basis), _xs(basis=basis, seed=1)
    again = _xs(basis=basis)
    assert helpers.same_bits(same.a, again.a)
    assert not torch.allclose(same.a, other.a)
    span = torch.linalg.svd(base(torch.float64).weight).Vh[:4]
    inside = (same.a @ span.T).norm() / same.a.norm()
    assert float(inside) < 0.9
    assert same.energy_kept() is None


@pytest.mark.parametrize("conv1d", [False, True])
def test_a_gradient_basis_is_the_svd_of_the_gradient_as_large_as_that_of_the_weight(conv1d):
    linear = base(torch.float64)
    gradient = torch.randn_like(linear.weight)
    if conv1d:
        as_linear, linear = linear, Conv1D(linear.out_features, linear.in_features).double()
        linear.weight.data = as_linear.weight.detach().T.contiguous()
    linear.weight.grad = gradient.T.clone() if conv1d else gradient
    layer = qk.LoRAXSLinear.from_linear(linear, 4, basis="gradient")
    u, s, vh = torch.linalg.svd(gradient)
    scale = torch.linalg.svdvals(linear.weight.detach())[0] / s[0]
    want = u[:, :4] @ (scale * s[:4, None] * vh[:4])
    torch.testing.assert_close(layer.b @ layer.a, want, rtol=1e-5, atol=1e-7)
    assert layer.energy_kept() is None


def test_a_gradient_basis_is_stored_and_never_rebuilt(tmp_path):
    path = tmp_path / "adapter.safetensors"
    model = nn.Sequential(base())
    model[0].weight.grad = torch.randn_like(model[0].weight)
    fresh = copy.deepcopy(model)
    assert fresh[0].weight.grad is None
    qk.adapt(model, ["0"], adapter="lora_xs", rank=4, basis="gradient", progress=False)
    with pytest.raises(ValueError, match=r"factors must be 'auto' or 'stored' for 0, .*'rebuild'"):
        qk.save_adapter(model, path, factors="rebuild")
    assert not path.exists()
    qk.save_adapter(model, path)
    loaded = qk.load_adapter(fresh, path)
    assert helpers.same_bits(loaded[0].a, model[0].a)
    assert helpers.same_bits(loaded[0].b, model[0].b)


def test_a_gradient_basis_needs_a_gradient():
    linear = base()
    make = functools.partial(qk.LoRAXSLinear.from_linear, rank=4, basis="gradient")
    for gradient, said in (
        (None, r"linear\.weight\.grad .* got None"),
        (torch.zeros_like(linear.weight), "norm 0.0"),
        (torch.full_like(linear.weight, torch.nan), "norm nan"),
    ):
        linear.weight.grad = gradient
        with pytest.raises(ValueError, match=said):
            make(linear)
    with pytest.raises(ValueError, match="got None"):
        qk.LoRAXSLinear(8, 8, rank=4, basis="gradient")


def test_starts_do_not_disturb_the_global_generator():
    """Only LoRA-XS's core draws from it: the other draws of a run stay as they are."""
    linear = base()
    state = torch.get_rng_state()
    qk.QRLinear.from_linear(linear, 4)
    qk.OHoRALinear.from_linear(linear, 4, columns="selected", start="random")
    qk.OHoRALinear.from_linear(linear, 4, start="kaiming")
    qk.linalg.truncated_svd(linear.weight, 4)
    assert torch.equal(torch.get_rng_state(), state)


# --- OHoRA


@pytest.mark.parametrize("start", ["qr", "svd", "random", "kaiming"])
@pytest.mark.parametrize("columns", ["leading", "selected"])
def test_every_start_leaves_the_model_as_it_was(start, columns):
    linear = base()
    layer = qk.OHoRALinear.from_linear(linear, 4, columns=columns, start=start, seed=1)
    assert helpers.same_bits(layer.a, layer.a0)
    torch.testing.assert_close(layer(tokens()), linear(tokens()), rtol=1e-5, atol=1e-5)
    assert (layer.delta_weight() == 0).all()


def test_starts_differ_and_random_ones_follow_the_seed():
    def start(**options):
        return qk.OHoRALinear.from_linear(base(), 4, columns="selected", **options).a0

    starts = [start(start=s) for s in ("qr", "svd", "random", "kaiming")]
    for i, left in enumerate(starts):
        for right in starts[:i]:
            assert not torch.allclose(left, right)
    for kind in ("random", "kaiming"):
        assert helpers.same_bits(start(start=kind, seed=3), start(start=kind, seed=3))
        assert not torch.equal(start(start=kind, seed=3), start(start=kind, seed=4))


def test_default_rank_is_the_highest():
    assert qk.OHoRALinear.from_linear(nn.Linear(48, 36)).rank == 6
    assert qk.OHoRALinear.from_linear(nn.Linear(48, 36), rank=3).rank == 3


def test_materialised_product_is_the_kronecker_one():
    layers = [trained("ohora", base(torch.float64), product=p) for p in ("kron", "materialised")]
    kron, materialised = layers
    x = tokens(torch.float64)
    torch.testing.assert_close(kron(x), materialised(x))
    assert kron.explain().name in helpers.cpu_backends("kron_linear", torch.float64)
    grads = [torch.autograd.grad(m(x).square().sum(), (m.a, m.b)) for m in layers]
    torch.testing.assert_close(*grads)


def test_lora_product_multiplies_uncut_factors():
    layer = trained("ohora", base(torch.float64), product="lora")
    assert layer.a.shape == (N, 4)
    assert layer.b.shape == (K, 4)
    want = layer.a @ layer.b.T - layer.a0 @ layer.b0.T
    torch.testing.assert_close(layer.delta_weight(), want.detach())


def test_fold_computes_the_same_and_the_weight_stays():
    folded, plain = (trained("ohora", base(torch.float64), fold=f) for f in (True, False))
    x = tokens(torch.float64)
    torch.testing.assert_close(folded(x), plain(x))
    assert helpers.same_bits(folded.weight, base(torch.float64).weight)
    assert "folded" not in folded.state_dict()
    want = folded.weight - torch.kron(folded.a0, folded.b0.T.contiguous())
    torch.testing.assert_close(folded.folded, want.detach())


def test_fold_follows_what_is_loaded_and_converted():
    """A copy that stays behind would give the old weight's outputs without a word."""
    source = base()
    with torch.no_grad():
        source.weight.mul_(3.0)
    loaded = trained("ohora", base(), fold=True)
    other = trained("ohora", source, fold=True)
    loaded.load_state_dict(other.state_dict())
    assert helpers.same_bits(loaded(tokens()), other(tokens()))
    converted = loaded.double()(tokens(torch.float64))
    plain = trained("ohora", source).double()(tokens(torch.float64))
    torch.testing.assert_close(converted, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", helpers.HALF, ids=str)
def test_fold_is_refused_for_half_precision(dtype):
    with pytest.raises(ValueError, match=r"fold needs float32 or float64 .* linear\.weight"):
        qk.OHoRALinear.from_linear(base(dtype), 4, fold=True)


# --- explain


def test_explain_tells_the_path_that_runs():
    assert trained("qr").explain().name == "composed"
    assert trained("ohora").explain().name == helpers.cpu_backends("kron_linear", torch.float32)[0]
    lora = trained("ohora", product="lora")
    assert lora.explain() == qk.backends.choose(
        qk.backends.Problem("linear_add", torch.device("cpu"), torch.float32, 2048, N, K, N)
    )


# --- refusals


@pytest.mark.parametrize(
    ("maker", "options", "error", "message"),
    [
        (
            "qr",
            {"rank": 33},
            ValueError,
            r"rank must be at most .* = 32 .* linear\.weight.* got 33",
        ),
        ("qr", {"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ("qr", {"rank": 2.0}, TypeError, "rank must be an int, got float"),
        ("qr", {"tau": 1.5}, ValueError, "tau must lie strictly between 0 and 1, got 1.5"),
        ("qr", {"tau": 0.5, "rank": 3}, ValueError, "rank and tau exclude each other"),
        ("qr", {"rank_rule": "largest"}, ValueError, "rank_rule must be one of .* got 'largest'"),
        ("qr", {"tau": 0.5, "max_rank": 0}, ValueError, "max_rank must be at least 1"),
        ("qr", {"rank": 3, "scaling": "1"}, TypeError, "scaling must be a float"),
        ("qr", {"rank": 3, "dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ("lora_xs", {"rank": 33}, ValueError, r"rank must be at most .* linear\.weight"),
        ("lora_xs", {"rank": 33, "basis": "random"}, ValueError, r"at most .* linear\.weight"),
        ("lora_xs", {"rank": 4, "vectors": "last"}, ValueError, "vectors must be one of"),
        ("lora_xs", {"rank": 4, "sigma": "up"}, ValueError, "sigma must be one of"),
        ("lora_xs", {"rank": 4, "basis": "qr"}, ValueError, "basis must be one of"),
        ("lora_xs", {"rank": 4, "alpha": "8"}, TypeError, "alpha must be a float"),
        ("lora_xs", {"rank": 4, "init_std": -1.0}, ValueError, "init_std must be at least 0"),
        ("ohora", {"rank": 5}, ValueError, r"rank must divide N and K .* linear\.weight.* got 5"),
        ("ohora", {"rank": 8}, ValueError, "at most r_high = 4"),
        ("ohora", {"columns": "all"}, ValueError, "columns must be one of"),
        ("ohora", {"start": "zero"}, ValueError, "start must be one of"),
        ("ohora", {"product": "dense"}, ValueError, "product must be one of"),
        ("ohora", {"product": "lora", "fold": True}, ValueError, "fold needs product='kron'"),
        ("ohora", {"product": "lora", "start": "random"}, ValueError, "needs start 'qr' or 'svd'"),
    ],
)
def test_options_out_of_range_are_named(maker, options, error, message):
    layer = {"qr": qk.QRLinear, "lora_xs": qk.LoRAXSLinear, "ohora": qk.OHoRALinear}[maker]
    with pytest.raises(error, match=message):
        layer.from_linear(base(), **options)


def _nan():
    linear = base()
    linear.weight.data[3, 3] = float("nan")
    return linear


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"rank": 4}, "qr"),
        ({"rank": 4}, "lora_xs"),
        ({"rank": 4, "basis": "random"}, "lora_xs"),
        ({}, "ohora"),
        ({"start": "kaiming"}, "ohora"),
    ],
)
def test_nan_weights_are_refused(kind, options):
    layer = {"qr": qk.QRLinear, "lora_xs": qk.LoRAXSLinear, "ohora": qk.OHoRALinear}[kind]
    with pytest.raises(ValueError, match=r"linear\.weight must be finite"):
        layer.from_linear(_nan(), **options)


def test_layers_that_cannot_be_adapted_are_refused():
    meta = nn.Linear(8, 8, device="meta")
    int8 = nn.Linear(8, 8)
    int8.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    hooked = torch.nn.utils.spectral_norm(nn.Linear(8, 8))
    wrapped = nn.Linear(8, 8)
    wrapped.forward = lambda x: x
    for linear, error, message in [
        (meta, ValueError, "must hold data, got a tensor on the meta device"),
        (int8, TypeError, "got torch.int8"),
        (normed, TypeError, "must have a plain weight, got a parametrised one"),
        (hooked, TypeError, "must be a parameter, got a plain tensor"),
        (wrapped, TypeError, "a forward of its own"),
        (trained("qr"), TypeError, "got qrlora_kernels.nn.qr.QRLinear with a forward"),
        (nn.Conv2d(1, 1, 1), TypeError, "must be an nn.Linear or a transformers Conv1D"),
        (nn.Linear(0, 8), ValueError, "must be a matrix with elements"),
    ]:
        with pytest.raises(error, match=message):
            qk.QRLinear.from_linear(linear, 4)
