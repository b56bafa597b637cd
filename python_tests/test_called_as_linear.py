"""An adapted layer is called, traced and exported as the plain one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.fx
from torch import nn
from transformers.pytorch_utils import Conv1D

import qrlora_kernels as qk

LAYERS = {
    "qr": (qk.QRLinear, {"rank": 3}),
    "lora_xs": (qk.LoRAXSLinear, {"rank": 3}),
    "ohora": (qk.OHoRALinear, {}),
    "ohora folded": (qk.OHoRALinear, {"fold": True}),
    "qr with dropout": (qk.QRLinear, {"rank": 3, "dropout": 0.5}),
}


def layer(kind: str, conv1d: bool = False, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    base = Conv1D(16, 8) if conv1d else nn.Linear(8, 16)
    adapter, options = LAYERS[kind]
    made = adapter.from_linear(base.to(dtype), **options)
    with torch.no_grad():
        for name in made.trainables:
            getattr(made, name).add_(0.3 * torch.randn(getattr(made, name).shape))
    return made.eval()


def x(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


every_kind = pytest.mark.parametrize("kind", LAYERS)
merged_or_not = pytest.mark.parametrize("merged", [False, True])


@pytest.mark.parametrize("conv1d", [False, True])
@every_kind
def test_with_another_class_in_front(kind, conv1d):
    """As fully_shard puts one there, which has no forward."""
    one = layer(kind, conv1d)
    y = one(x())
    one.__class__ = type("InFront", (type("Sharded", (), {}), type(one)), {})
    assert torch.equal(one(x()), y)


@merged_or_not
@pytest.mark.parametrize("conv1d", [False, True])
@every_kind
def test_by_the_name_of_its_argument(kind, conv1d, merged):
    one = layer(kind, conv1d)
    y = one(x())
    if merged:
        one.merge()
    close(one(x=x()) if conv1d else one(input=x()), y)
    with pytest.raises(TypeError, match="unexpected keyword"):
        one(input=x()) if conv1d else one(x=x())


@merged_or_not
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("kind", ["qr", "lora_xs", "ohora", "ohora folded"])
def test_symbolic_trace_gives_the_same_and_trains(kind, conv1d, merged):
    net = nn.Sequential(nn.Tanh(), layer(kind, conv1d), nn.ReLU())
    if merged:
        net[1].merge()
    traced = torch.fx.symbolic_trace(net)
    close(traced(x()), net(x()))
    close(traced(x()[:2]), net(x()[:2]))  # no length was taken for a constant
    if not merged:
        traced(x()).sum().backward()
        got = [getattr(net[1], n).grad.clone() for n in net[1].trainables]
        net.zero_grad()
        net(x()).sum().backward()
        for name, gradient in zip(net[1].trainables, got, strict=True):
            close(gradient, getattr(net[1], name).grad)


def test_symbolic_trace_keeps_the_operation_as_one_node():
    graph = torch.fx.symbolic_trace(nn.Sequential(layer("qr"))).graph
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    assert calls == [qk.functional.qr_linear]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are checked in Python
@merged_or_not
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["qr", "lora_xs", "ohora", "ohora folded"])
def test_jit_trace_with_its_check_and_gradients(kind, training, merged):
    one = layer(kind)
    if merged:
        one.merge()
    one.train(training and not merged)
    traced = torch.jit.trace(one, x())
    close(traced(x()), one(x()))
    close(traced(x()[:2]), one(x()[:2]))
    if not merged:
        traced(x()).sum().backward()
        got = [getattr(traced, n).grad.clone() for n in one.trainables]
        one.zero_grad()
        one(x()).sum().backward()
        for name, gradient in zip(one.trainables, got, strict=True):
            close(gradient, getattr(one, name).grad)


@merged_or_not
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("kind", ["qr", "lora_xs", "ohora"])
def test_export_of_any_number_of_rows(kind, conv1d, merged):
    one = layer(kind, conv1d)
    if merged:
        one.merge()
    rows = {0: torch.export.Dim("rows", min=2)}
    exported = torch.export.export(one, (x(),), dynamic_shapes=(rows,)).module()
    close(exported(x()), one(x()))
    close(exported(x()[:3]), one(x()[:3]))


@every_kind
def test_jit_script_says_what_to_do(kind):
    one = layer(kind)
    with pytest.raises(TypeError, match="merge it first, or use torch"):
        torch.jit.script(nn.Sequential(nn.Tanh(), one))
    one.merge()
    net = nn.Sequential(nn.Tanh(), one)
    close(torch.jit.script(net)(x()), net(x()))
    assert one.merged


def jagged(requires_grad: bool = False) -> torch.Tensor:
    return torch.nested.nested_tensor(
        [x()[:2], x()[2:]], layout=torch.jagged, requires_grad=requires_grad
    )


@merged_or_not
@pytest.mark.parametrize("conv1d", [False, True])
@every_kind
def test_jagged_tensors_with_their_gradients(kind, conv1d, merged):
    one = layer(kind, conv1d)
    if merged:
        one.merge()
    rows = jagged(requires_grad=True)
    y = one(rows)
    for part, want in zip(y.unbind(), (one(x()[:2]), one(x()[2:])), strict=True):
        close(part, want)
    close((y + y).values(), 2 * one(x()))
    if not conv1d:
        assert (torch.nn.functional.linear(rows, one.weight) + y).is_nested  # the same lengths
    y.values().square().sum().backward()
    plain = x().requires_grad_()
    got = {} if merged else {n: getattr(one, n).grad.clone() for n in one.trainables}
    one.zero_grad()
    one(plain).square().sum().backward()
    close(rows.grad.values(), plain.grad)
    for name, gradient in got.items():
        close(gradient, getattr(one, name).grad)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_jagged_tensors_of_four_dimensions_and_transposed_ones():
    one = layer("qr")
    heads = torch.nested.nested_tensor(
        [torch.randn(2, 3, 8), torch.randn(4, 3, 8)], layout=torch.jagged
    )
    for part, given in zip(one(heads).unbind(), heads.unbind(), strict=True):
        close(part, one(given))
    with pytest.raises(ValueError, match="several lengths in dimension 1, got them in dimension 2"):
        one(heads.transpose(1, 2))
    with pytest.raises(TypeError, match="x must be a dense tensor, got a nested tensor"):
        one(torch.nested.nested_tensor([x()[:2], x()[2:]]))


def test_jagged_tensors_compiled():
    one = layer("qr")
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    close(compiled(jagged()).values(), one(x()))


@pytest.mark.parametrize("kind", ["qr", "lora_xs", "ohora"])
def test_subclasses_with_a_torch_function_see_one_call(kind):
    seen = []

    class Seen(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs)

    one = layer(kind)
    y = one(x().as_subclass(Seen))
    assert type(y) is Seen
    close(y.as_subclass(torch.Tensor), one(x()))
    assert one.operation in seen


def test_a_copy_traces_as_the_original():
    one = copy.deepcopy(layer("lora_xs"))
    close(torch.fx.symbolic_trace(nn.Sequential(one))(x()), one(x()))
