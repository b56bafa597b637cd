"""Adapted bf16 layers by panels: one native call, and the bits of the layer without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels import native, panels
from qrlora_kernels.dispatch import chooser
from qrlora_kernels.nn import layouts, prepacked
from qrlora_kernels.ops import eager

pytestmark = pytest.mark.skipif(not eager.AVAILABLE, reason=native.REASON)
BF16 = torch.bfloat16
PAYS = panels.pays_adapted
RANK = {"qr": 7, "lora_xs": 7, "ohora": 5}
# The same sums over the weight where it lies.
NATIVE = {"qr": "cpu:native", "lora_xs": "cpu:native", "ohora": "cpu:native base"}
every_adapter = pytest.mark.parametrize("adapter", RANK)


@pytest.fixture(autouse=True)
def for_every_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On whatever processor the tests run, whose measurements these are not."""
    monkeypatch.setattr(panels, "used", lambda dtype: True)
    monkeypatch.setattr(prepacked, "multiplies", lambda device, dtype: True)
    monkeypatch.setattr(layouts, "LEAST_WORK", 0)
    monkeypatch.setattr(panels, "pays_adapted", lambda *shape: True)
    chooser.forget()
    yield
    chooser.forget()


def net(adapter: str, dtype: torch.dtype = BF16, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(45, 70)).to(dtype)
    qk.adapt(model, ["0"], adapter=adapter, rank=RANK[adapter], progress=False, **options)
    with torch.no_grad():
        for trained in model[0].trained_now().values():
            trained.normal_()
    return model


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def choices(adapter: str = "qr") -> list[str]:
    op = "kron" if adapter == "ohora" else "low_rank"
    found = [chooser.last_choice(op, step) for step in ("fwd", "bwd")]
    return [f"{choice.backend}:{choice.recipe}" for choice in found if choice]


@pytest.mark.parametrize("lead", [(5,), (2, 3), ()], ids=str)
@every_adapter
def test_the_same_bits_as_without(adapter: str, lead: tuple[int, ...]) -> None:
    model, x = net(adapter), torch.randn(*lead, 45).to(BF16)
    with qk.backends.use_backend(NATIVE[adapter]):
        plain = step(model, x)
    qk.prepack(model, packed="both")
    found = step(model, x)
    assert choices(adapter) == ["cpu:panels", "cpu:panels"]
    assert all(map(torch.equal, found, plain))
    with torch.no_grad():
        assert torch.equal(model(x), plain[0])


@every_adapter
def test_forward_alone_keeps_half_of_it(adapter: str) -> None:
    model, x = net(adapter), torch.randn(5, 45).to(BF16)
    with qk.backends.use_backend(NATIVE[adapter]):
        plain = step(model, x)
    qk.prepack(model, packed="forward")
    found = step(model, x)
    assert choices(adapter)[0] == "cpu:panels"
    assert choices(adapter)[1] != "cpu:panels"
    assert torch.equal(found[0], plain[0])
    once = qk.summary(model).kept_bytes
    qk.prepack(model, False)
    qk.prepack(model, packed="both")
    step(model, x)
    assert once < qk.summary(model).kept_bytes


@every_adapter
def test_under_autocast_over_an_fp32_weight(adapter: str) -> None:
    model, x = net(adapter, torch.float32), torch.randn(5, 45)
    with torch.autocast("cpu", BF16):
        with qk.backends.use_backend(NATIVE[adapter]):
            plain = step(model, x)
        qk.prepack(model, packed="both")
        found = step(model, x)
        assert choices(adapter) == ["cpu:panels", "cpu:panels"]
    assert [t.dtype for t in found] == [t.dtype for t in plain]
    assert all(map(torch.equal, found, plain))


@pytest.mark.parametrize("name", ["weight", "q", "r"])
def test_no_answer_is_of_old_operands(name: str) -> None:
    model, x = net("qr"), torch.randn(5, 45).to(BF16)
    qk.prepack(model, packed="both")
    before = step(model, x)
    with torch.no_grad():
        getattr(model[0], name).mul_(2)
    after = step(model, x)
    assert not torch.equal(before[0], after[0])
    qk.prepack(model, False)
    with qk.backends.use_backend("cpu:native"):
        assert all(map(torch.equal, after, step(model, x)))


@every_adapter
def test_a_small_layer_makes_no_panels(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would be memory for nothing: the chooser takes the operands where they lie."""
    monkeypatch.setattr(panels, "pays_adapted", PAYS)
    chooser.forget()
    model, x = net(adapter), torch.randn(5, 45).to(BF16)
    qk.prepack(model, packed="both")
    step(model, x)
    assert not any("laid out" in name for name in model[0].derived.nbytes())


@every_adapter
def test_a_cast_before_the_backward_is_refused(adapter: str) -> None:
    """The saved weight is read again, as the dtype that it had."""
    model, x = net(adapter), torch.randn(5, 45).to(BF16).requires_grad_()
    qk.prepack(model, packed="forward")
    y = model(x)
    model.double()
    with pytest.raises(RuntimeError, match="cast before the backward"):
        y.sum().backward()
