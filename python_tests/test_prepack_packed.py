"""Plain frozen layers by weights in a kernel's layout: right numbers, never old ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels import native, packed, panels
from qrlora_kernels.nn import layouts, prepacked

SIZES = [(48, 40), (64, 1100), (33, 512), (96, 513)]  # N, K: one piece and several


@pytest.fixture(params=["panels", "onednn"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[layouts.Layout]:
    """Every layout that this machine has, for products of every size."""
    if request.param == "panels" and native.CORE is None:
        pytest.skip(native.REASON)
    if request.param == "onednn" and not packed.packs(torch.float32):
        pytest.skip("this PyTorch does not pack fp32 weights here")
    kind = panels if request.param == "panels" else packed
    monkeypatch.setattr(panels, "used", lambda dtype: kind is panels)
    monkeypatch.setattr(kind, "pays", lambda m, n, k, dtype: m > 0 and dtype != torch.float64)
    return panels.Panels if kind is panels else packed.Packed


needs_layout = pytest.mark.usefixtures("layout")


def net(n: int, k: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n, bias=bias), nn.GELU(), nn.Linear(n, 8))
    return qk.adapt(model, ["2"], rank=4, progress=False)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = model[0](x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


def kept(model: nn.Module) -> list[str]:
    return sorted(vars(model[0])["derived"].nbytes())


@needs_layout
@pytest.mark.parametrize("directions", ["forward", "both"])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_no_worse_than_twice_the_error_of_linear(n: int, k: int, directions: Any) -> None:
    """Contract 1: in one piece of 1,100 columns it would be worse."""
    model = net(n, k)
    x = torch.randn(300, k)
    plain = step(model, x)
    qk.prepack(model, packed=directions)
    found = step(model, x)
    exact = step(copy.deepcopy(model).double(), x.double())
    for got, want, truth in zip(found, plain, exact, strict=True):
        assert _rms(got - truth) <= 2 * _rms(want - truth)
    wanted = ["laid out for dx"] * (directions == "both") + ["laid out for y"]
    assert [name.partition(" in ")[0] for name in kept(model)] == wanted
    again = step(model, x)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    with torch.no_grad():
        assert torch.equal(model[0](x), found[0])


def _rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


@needs_layout
def test_leading_dimensions_strides_and_no_bias() -> None:
    model = net(48, 40, bias=False)
    x = torch.randn(40, 6, 5).permute(1, 2, 0)
    want = model[0](x)
    qk.prepack(model, packed="both")
    torch.testing.assert_close(model[0](x), want)
    assert model[0](x).shape == (6, 5, 48)
    assert model[0](x[:0]).shape == (0, 5, 48)


@needs_layout
def test_a_bias_that_trains_and_a_second_derivative() -> None:
    model = net(48, 40)
    model[0].bias.requires_grad_()
    x = torch.randn(7, 40, requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(model[0](x).pow(3).sum(), x, create_graph=True)
        return dx, *torch.autograd.grad(dx.square().sum(), (x, model[0].bias))

    want = gradients()
    qk.prepack(model, packed="both")
    torch.testing.assert_close(gradients(), want, rtol=1e-4, atol=1e-4)
    assert kept(model)


@needs_layout
@pytest.mark.parametrize("how", ["write", "replace", "load", "double"])
def test_no_answer_is_of_an_old_weight(how: str) -> None:
    model, x = net(48, 40), torch.randn(7, 40)
    qk.prepack(model, packed="both")
    before = step(model, x)
    with torch.no_grad():
        if how == "write":
            model[0].weight.add_(1)
        elif how == "replace":
            model[0].weight = nn.Parameter(model[0].weight + 1, requires_grad=False)
        elif how == "load":
            model[0].load_state_dict({name: t + 1 for name, t in model[0].state_dict().items()})
        else:
            model.double()
            x = x.double()
    y, dx = step(model, x)
    torch.testing.assert_close(y, F.linear(x, model[0].weight, model[0].bias))
    torch.testing.assert_close(dx, 2 * y @ model[0].weight)
    assert how == "double" or not torch.equal(y, before[0])


@needs_layout
def test_it_is_in_no_state_dict_and_no_copy_and_goes_when_told() -> None:
    model, x = net(64, 40), torch.randn(7, 40)
    want, keys = model[0](x), [*model.state_dict()]
    qk.prepack(model, packed="forward")
    found = model[0](x)
    assert qk.summary(model).kept_bytes == model[0].weight.nbytes
    assert [*model.state_dict()] == keys
    assert not kept(copy.deepcopy(model))
    assert torch.equal(copy.deepcopy(model)[0](x), found)
    qk.prepack(model)
    assert torch.equal(model[0](x), want)
    assert not kept(model)
    qk.prepack(model, False)
    assert type(model[0]) is nn.Linear
    assert not {"packed", "derived"} & vars(model[0]).keys()


@needs_layout
def test_adapt_does_it_at_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48), nn.Linear(48, 8))
    qk.adapt(model, ["1"], rank=4, progress=False, prepack="both")
    step(model, torch.randn(7, 40))
    assert len(kept(model)) == 2
    qk.prepack(model, False)
    qk.adapt(model, ["0"], rank=4, progress=False, prepack=True)
    assert model[0]._prepack


@pytest.mark.parametrize(
    "call",
    [
        lambda m: qk.prepack(m, packed="backward"),
        lambda m: qk.adapt(m, ["0"], rank=4, progress=False, prepack="backward"),
    ],
    ids=["prepack", "adapt"],
)
def test_another_direction_is_refused(call: Any) -> None:
    model = nn.Sequential(nn.Linear(40, 48))
    with pytest.raises(ValueError, match=r"must be one of .*forward, both, got 'backward'"):
        call(model)
    assert type(model[0]) is nn.Linear


@needs_layout
def test_autocast_without_products_of_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is rounded as autocast does, and multiplied in fp32."""
    monkeypatch.setattr(prepacked, "multiplies", lambda device, dtype: False)
    model, x = net(48, 40), torch.randn(7, 40)
    qk.prepack(model)
    with torch.autocast("cpu", torch.bfloat16):
        want = model[0](x)
        qk.prepack(model, packed="both")
        found = model[0](x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, want)
    assert any("bfloat16 as torch.float32" in name for name in kept(model))


@needs_layout
@pytest.mark.parametrize("how", ["cannot", "compiled", "fp64"])
def test_without_it_the_answer_is_that_of_linear(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(48, 40), torch.randn(7, 40)
    if how == "cannot":
        monkeypatch.setattr(panels, "used", lambda dtype: False)
        monkeypatch.setattr(packed, "packs", lambda dtype: False)
    if how == "fp64":
        model, x = model.double(), x.double()
    qk.prepack(model, packed="both")
    layer = torch.compile(model[0], backend="eager") if how == "compiled" else model[0]
    assert torch.equal(layer(x), F.linear(x, model[0].weight, model[0].bias))
    assert not any("laid out" in name for name in kept(model))


def test_a_library_that_answers_wrong_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed.Packed, "product", lambda self, x, bias: x @ torch.ones(16, 12))
    packed.packs.cache_clear()
    try:
        assert not packed.packs(torch.float32)
    finally:
        packed.packs.cache_clear()


@pytest.mark.parametrize(
    ("capability", "sizes"),
    [
        ("AVX2", {(4, 4096, 1024): False, (512, 1024, 1024): False}),
        ("AVX512", {(16, 384, 384): False, (512, 384, 384): True, (1, 1024, 1024): True}),
    ],
)
def test_where_it_is_taken(
    capability: str, sizes: dict[tuple[int, int, int], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for size, wanted in sizes.items():
        assert packed.pays(*size, torch.float32) == wanted
    assert packed.pays(16, 4096, 4096, torch.bfloat16) == (capability == "AVX512")
