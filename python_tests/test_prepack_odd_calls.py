"""Odd calls over operands in panels: the answer, or the error, of the same layer without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import qrlora_kernels as qk
from qrlora_kernels import functional, native, panels
from qrlora_kernels.dispatch import chooser
from qrlora_kernels.nn import layouts

pytestmark = pytest.mark.skipif(native.CORE is None, reason=native.REASON)
M, N, K, RANK = 9, 48, 40, 7
KINDS = ["plain", "qr", "lora_xs", "ohora"]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def for_every_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(panels, "used", lambda dtype: True)
    monkeypatch.setattr(panels, "pays", lambda m, n, k, dtype: True)
    monkeypatch.setattr(layouts, "LEAST_WORK", 0)
    monkeypatch.setattr(panels, "pays_adapted", lambda *shape: True)
    chooser.forget()
    yield
    chooser.forget()


def layer_of(kind: str, packed: bool, bias: bool = True) -> Any:
    """A layer, with its frozen operands in panels or without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, bias=bias)).requires_grad_(False)
    if kind != "plain":
        qk.adapt(model, ["0"], adapter=kind, rank=4 if kind == "ohora" else RANK, progress=False)
        for gate in model[0].trained_now().values():
            nn.init.normal_(gate)
    return (qk.prepack(model, packed="both") if packed else model)[0]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def used(layer: Any) -> bool:
    return any("laid out" in name for name in layer.derived.nbytes())


def both(kind: str, call: Callable[[Any], Any], **options: Any) -> list[Any]:
    """What ``call`` gives, or its error, of a layer without panels and of one with."""

    def told(layer: Any) -> Any:
        try:
            return call(layer)
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    return [told(layer_of(kind, packed, **options)) for packed in (False, True)]


def agree(kind: str, call: Callable[[Any], Any], **options: Any) -> None:
    without, with_panels = both(kind, call, **options)
    if isinstance(without, str) or isinstance(with_panels, str):
        assert without == with_panels
    else:
        torch.testing.assert_close(with_panels, without)


def backward(layer: Any, dy: Tensor, **options: Any) -> Tensor:
    x = drawn(M, K).requires_grad_()
    return torch.autograd.grad(layer(x), x, dy, **options)[0]


@every_kind
def test_a_forward_mode_derivative(kind: str) -> None:
    def tangent(layer: Any) -> Tensor:
        with forward_ad.dual_level():
            y = layer(forward_ad.make_dual(drawn(M, K), drawn(K, M).mT))
            return forward_ad.unpack_dual(y).tangent

    agree(kind, tangent)


@every_kind
def test_a_forward_mode_derivative_of_the_backward_alone(kind: str) -> None:
    def tangent(layer: Any) -> Tensor:
        x = drawn(M, K).requires_grad_()
        y = layer(x)
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(torch.ones(M, N), drawn(M, N))
            return forward_ad.unpack_dual(torch.autograd.grad(y, x, dy)[0]).tangent

    found = both(kind, tangent)
    assert found[0] is not None
    if kind == "plain":
        torch.testing.assert_close(*found)
    else:
        assert found[0] == found[1]
        assert found[0].startswith("RuntimeError: dy must have no tangent, got one")


@every_kind
def test_batched_gradients(kind: str) -> None:
    agree(kind, lambda layer: backward(layer, drawn(3, M, N), is_grads_batched=True))


@every_kind
def test_a_mode_around_the_backward_alone(kind: str) -> None:
    def flops(layer: Any) -> int:
        y = layer(drawn(M, K).requires_grad_()).sum()
        with FlopCounterMode(display=False) as counter:
            y.backward()
        return int(counter.get_total_flops())

    assert both(kind, flops)[0] > 0
    agree(kind, flops)


@every_kind
def test_a_mode_that_answers_the_call(kind: str) -> None:
    answered = {
        F.linear,
        functional.qr_linear,
        functional.lora_xs_linear,
        functional.kron_linear,
    }

    class Zeros(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            return torch.zeros(M, N) if func in answered else func(*args, **(kwargs or {}))

    def call(layer: Any) -> Tensor:
        with Zeros():
            y: Tensor = layer(drawn(M, K))
        return y

    found = both(kind, call)
    assert not found[0].any()
    assert not found[1].any()


INPUTS = {
    "sparse": lambda: drawn(M, K).to_sparse(),
    "csr": lambda: drawn(M, K).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([drawn(M, K), drawn(3, K)]),
    "meta": lambda: drawn(M, K).to("meta"),
}


@every_kind
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_an_input_that_no_kernel_reads(kind: str, given: str) -> None:
    def call(layer: Any) -> Tensor:
        y: Tensor = layer(INPUTS[given]())
        return y.to_padded_tensor(0.0) if y.is_nested else y

    agree(kind, call)


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@every_kind
@pytest.mark.parametrize("wrong", ["bias of one", "short bias", "larger weight", "weight of a row"])
def test_a_weight_and_a_bias_that_do_not_fit(kind: str, wrong: str) -> None:
    """A kernel would read behind them."""

    def call(layer: Any) -> Tensor:
        if wrong == "larger weight":
            layer.weight = frozen(drawn(N + 16, K))
        elif wrong == "weight of a row":
            layer.weight, layer.bias = frozen(drawn(K)), None
        else:
            layer.bias = frozen(drawn(1 if wrong == "bias of one" else N - 18))
        y: Tensor = layer(drawn(M, K))
        return y

    agree(kind, call)


FACTORS = [
    ("up", (20, RANK)),
    ("up", (N, RANK - 2)),
    ("down", (RANK, 30)),
    ("down", (RANK - 2, K)),
    ("down", (RANK + 5, K)),
    ("down", (K,)),
]
GATES = [(), (1, RANK), (RANK, 1), (3, RANK), (3, RANK, RANK), (RANK, RANK), (RANK,)]


@pytest.mark.parametrize("kind", ["qr", "lora_xs"])
@pytest.mark.parametrize(("side", "shape"), [*FACTORS, *(("gate", s) for s in GATES)], ids=str)
def test_a_factor_or_a_gate_that_does_not_fit(kind: str, side: str, shape: Any) -> None:
    """A vector for a core, or a core for a vector, would be the other adapter."""

    def call(layer: Any) -> Tensor:
        tensor = drawn(*shape)
        value = nn.Parameter(tensor) if side == "gate" else tensor
        setattr(layer, getattr(layer.adapter, side), value)
        y: Tensor = layer(drawn(M, K)).detach()
        return y

    agree(kind, call)


@pytest.mark.parametrize("kind", ["qr", "lora_xs"])
@pytest.mark.parametrize("side", ["up", "down", "gate"])
def test_a_factor_of_another_dtype(kind: str, side: str) -> None:
    def call(layer: Any) -> Tensor:
        name = getattr(layer.adapter, side)
        wide = getattr(layer, name).detach().double()
        setattr(layer, name, nn.Parameter(wide) if side == "gate" else wide)
        y: Tensor = layer(drawn(M, K))
        return y

    found = both(kind, call)
    assert found[0] == found[1]
    assert found[0].startswith("TypeError: ")


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("directions", ["forward", "both"])
def test_a_cast_before_the_backward(kind: str, directions: Any) -> None:
    layer = layer_of(kind, False)
    qk.prepack(layer, packed=directions)
    y = layer(drawn(M, K).requires_grad_())
    layer.double()
    with pytest.raises(RuntimeError, match="weight must be of the forward's dtype"):
        y.sum().backward()


@every_kind
def test_double_precision_is_multiplied_in_panels(kind: str) -> None:
    agree(kind, lambda layer: layer.double()(drawn(M, K).double()).detach())
    layer = layer_of(kind, True).double()
    layer(drawn(M, K).double())
    assert used(layer)


@every_kind
def test_a_double_weight_under_autocast(kind: str) -> None:
    def call(layer: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = layer.double()(drawn(M, K))
        return y

    found = both(kind, call, bias=False)
    assert found[0] == found[1]
    assert isinstance(found[0], str)
