"""Adapted layers by frozen operands in panels: the same adapter, chosen by name, never old."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from error_bound import WORSE_THAN_EAGER
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels import native, panels
from qrlora_kernels.dispatch import chooser
from qrlora_kernels.nn import layouts, prepacked

pytestmark = pytest.mark.skipif(native.CORE is None, reason=native.REASON)
LOW_RANK = ("low_rank", "cpu:native")
ADAPTERS = {"qr": {"rank": 7}, "lora_xs": {"rank": 7}, "ohora": {"rank": 4}}


@pytest.fixture(autouse=True)
def for_every_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On whatever processor the tests run, whose measurements these are not."""
    monkeypatch.setattr(panels, "used", lambda dtype: True)
    monkeypatch.setattr(layouts, "LEAST_WORK", 0)
    monkeypatch.setattr(panels, "pays_adapted", lambda *shape: True)
    chooser.forget()
    yield
    chooser.forget()


def net(
    adapter: str = "qr", n: int = 48, k: int = 40, bias: bool = True, **options: Any
) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n, bias=bias))
    qk.adapt(model, ["0"], adapter=adapter, progress=False, **{**ADAPTERS[adapter], **options})
    with torch.no_grad():
        for trained in model[0].trained_now().values():
            trained.normal_()
    return model


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    return [t.clone() for t in (y.detach(), x.grad, *trained) if t is not None]


def choices(op: str = "low_rank") -> list[str]:
    found = [chooser.last_choice(op, step) for step in ("fwd", "bwd")]
    return [f"{choice.backend}:{choice.recipe}" for choice in found if choice]


def used(model: nn.Module) -> bool:
    return any("laid out" in name for name in model[0].derived.nbytes())


def _rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


@pytest.mark.parametrize("directions", ["forward", "both"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_contract_1_and_the_same_bits_again(adapter: str, directions: Any) -> None:
    model, x = net(adapter, 288, 1100), torch.randn(70, 1100)
    plain = step(model, x)
    exact = step(copy.deepcopy(model).double(), x.double())
    qk.prepack(model, packed=directions)
    found = step(model, x)
    op, as_it_lies = ("kron", "cpu:native base") if adapter == "ohora" else LOW_RANK
    by_step = ["cpu:panels", "cpu:panels" if directions == "both" else as_it_lies]
    assert choices(op) == by_step
    for got, want, truth in zip(found, plain, exact, strict=True):
        assert _rms(got - truth) <= WORSE_THAN_EAGER * _rms(want - truth)
    assert all(map(torch.equal, found, step(model, x)))
    with torch.no_grad():
        assert torch.equal(model(x), found[0])


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_leading_dimensions_strides_no_bias_and_strength(adapter: str, strength: float) -> None:
    model = net(adapter, bias=False)
    qk.scale(model, strength)
    x = torch.randn(40, 6, 5).permute(1, 2, 0)
    want = step(model, x)
    qk.prepack(model, packed="both")
    for got, expected in zip(step(model, x), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert model(x[:0]).shape == (0, 5, 48)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_bias_that_trains(adapter: str) -> None:
    model, x = net(adapter), torch.randn(9, 40)
    model[0].bias.requires_grad_()
    want = step(model, x)
    qk.prepack(model, packed="both")
    for got, expected in zip(step(model, x), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert used(model)


def test_a_second_derivative_is_refused_as_without() -> None:
    model, x = net(), torch.randn(9, 40, requires_grad=True)

    def derivative() -> Tensor:
        (dx,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    with pytest.raises(RuntimeError) as before:
        derivative()
    qk.prepack(model, packed="both")
    with pytest.raises(RuntimeError) as after:
        derivative()
    assert str(after.value) == str(before.value)


@pytest.mark.parametrize("how", ["write", "factor", "load", "merge", "double", "refresh"])
def test_no_answer_is_of_old_operands(how: str) -> None:
    model, x = net(), torch.randn(9, 40)
    qk.prepack(model, packed="both")
    before = step(model, x)
    assert used(model)
    with torch.no_grad():
        if how == "write":
            model[0].weight.add_(1)
        elif how == "factor":
            model[0].q.mul_(2)
        elif how == "load":
            other = net()
            other[0].weight.mul_(3)
            model.load_state_dict(other.state_dict())
        elif how == "merge":
            model.eval()[0].merge()  # a merged layer does not train
        elif how == "double":
            model.double()
            x = x.double()
        else:
            model[0].weight.data.add_(1)
            qk.refresh(model)
    found = step(model, x)
    want = step(qk.prepack(copy.deepcopy(model), False), x)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected)
    assert how in ("double", "merge") or not torch.equal(found[0], before[0])


OPTIONS: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.5},
    "output": {"factors": "output"},
    "fold": {"adapter": "ohora", "fold": True},
    "materialised": {"adapter": "ohora", "product": "materialised"},
}


@pytest.mark.parametrize("how", [*OPTIONS, "forced", "compiled", "off", "rows"])
def test_who_goes_without(how: str) -> None:
    model, x = net(**OPTIONS.get(how, {})), torch.randn(9, 40)
    if how == "rows":
        qk.prepack(model)
    else:
        qk.prepack(model, packed="both")
    if how == "forced":
        with qk.backends.use_backend("composed"):
            step(model, x)
        assert choices()[0] == "composed:addmm"
    elif how == "compiled":
        torch.compile(model, backend="eager")(x)
    elif how == "off":
        with qk.disabled(model):
            torch.testing.assert_close(
                model(x), torch.nn.functional.linear(x, model[0].weight, model[0].bias)
            )
        return
    else:
        step(model, x)
    assert not used(model)


def test_a_wrong_input_has_the_same_message() -> None:
    model = net()
    messages = []
    for packed in (False, True):
        if packed:
            qk.prepack(model, packed="both")
        for x in (torch.randn(3, 41), torch.randn(3, 40).double(), torch.tensor(1.0)):
            with pytest.raises((ValueError, TypeError)) as error:
                model(x)
            messages.append(str(error.value))
    assert messages[:3] == messages[3:]


def test_in_no_state_dict_and_no_copy_and_counted() -> None:
    model, x = net(), torch.randn(9, 40)
    keys = [*model.state_dict()]
    qk.prepack(model, packed="both")
    step(model, x)
    layer = model[0]
    least = 2 * (layer.weight.nbytes + layer.q.nbytes + layer.r.nbytes)
    assert qk.summary(model).kept_bytes >= least
    assert [*model.state_dict()] == keys
    assert not used(copy.deepcopy(model))
    qk.prepack(model)
    assert not used(model)


def test_autocast_without_products_of_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight and factors are rounded as autocast does, and multiplied in fp32."""
    monkeypatch.setattr(prepacked, "multiplies", lambda device, dtype: False)
    model, x = net(), torch.randn(9, 40)
    qk.prepack(model)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        qk.prepack(model, packed="both")
        found = model(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, want)
    assert used(model)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_training_agrees_with_and_without(adapter: str) -> None:
    x, target = torch.randn(60, 40), torch.randn(60, 48)
    trained = []
    for packed in (None, "both"):
        model = net(adapter)
        if packed:
            qk.prepack(model, packed="both")
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(weights, 0.01)
        for _ in range(5):
            (model(x) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append([p.detach() for p in weights])
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_chooser_is_asked_and_tune_measures_it(
    adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net(adapter, 96, 64)
    qk.prepack(model, packed="both")
    layer = model[0]
    assert layer.explain(40).recipe == layer.explain(40, "bwd").recipe == "panels"
    monkeypatch.setattr(panels, "pays_adapted", lambda *shape: False)
    chooser.forget()
    many = layer.explain(257)
    assert many.recipe != "panels"
    assert "(rule 9)" in many.reason
    found = qk.tune(model, [8], seconds=0.01, progress=False)
    assert all("cpu:panels" in contest.seconds for contest in found.contests)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_autocast_around_the_backward_alone(adapter: str) -> None:
    """It recast a core and its product, which the kernel then read as twice as long."""
    model, x = net(adapter, 96, 64), torch.randn(30, 64, requires_grad=True)
    qk.prepack(model, packed="both")
    dy = torch.randn(30, 96)
    trained = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(x), [x, *trained], dy)
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, [x, *trained], dy)
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("lead", [(6,), (2, 3)], ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_y_may_be_written_in_place(adapter: str, lead: tuple[int, ...]) -> None:
    model, x = net(adapter), torch.randn(*lead, 40)
    want = torch.relu(model(x))
    qk.prepack(model, packed="both")
    y = nn.Sequential(model, nn.ReLU(inplace=True))(x.requires_grad_())
    y.sum().backward()
    assert used(model)
    torch.testing.assert_close(y, want)


def test_panels_refuse_rows_of_another_width_or_dtype() -> None:
    kept, x = panels.Panels(torch.randn(8, 5)), torch.randn(3, 5)
    kept.product(x)
    for wrong in (x.double(), x.bfloat16(), x[:, 1:]):
        with pytest.raises(ValueError, match="as the panels are, got"):
            kept.product(wrong)
    for onto in (torch.zeros(3, 7), torch.zeros(2, 8), torch.zeros(3, 8).double()):
        with pytest.raises(ValueError, match=r"onto must be \[3, 8\]"):
            kept.product(x, onto=onto)
