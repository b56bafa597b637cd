"""``torch.fx`` and other listeners to ``__torch_function__`` see each public function as one."""

from __future__ import annotations

import operator
from typing import Any

import helpers
import pytest
import torch
from cases import MIXED_CORE, MIXED_VECTOR, draw
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import qrlora_kernels as qk
from qrlora_kernels import functional

OPS = (*helpers.OPS, "mixed_vector", "mixed_core")


def _operands(op: str) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """The function's name, its operands, and which of them train."""
    if not op.startswith("mixed"):
        given = helpers.operands(op, 5, 24, 36, 6)
        return op, given, ("x", *helpers.TRAINABLES[op])
    case = draw(MIXED_VECTOR if op == "mixed_vector" else MIXED_CORE, 5, 24, 36, 6, torch.float32)
    p = case.p
    given = {"x": p.x, "weight": p.weight, "bias": p.bias, "a": p.down, "b": p.up}
    return "mixed_low_rank_linear", given | {"gates": p.gate, "index": p.index}, ("x", "gates")


class Calls(nn.Module):
    """A module that calls one of the functions on x and operands of its own, and goes on."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.name, given, trains = _operands(op)
        self.names = [name for name in given if name != "x"]
        for name in self.names:
            if name in trains:
                self.register_parameter(name, nn.Parameter(given[name]))
            else:
                self.register_buffer(name, given[name])

    def forward(self, x: Tensor) -> Tensor:
        operands = [getattr(self, name) for name in self.names]
        y: Tensor = getattr(functional, self.name)(x + 1, *operands)
        return torch.relu(y)


def _called(graph: torch.fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("op", OPS)
def test_a_call_is_one_node_with_the_same_values_and_gradients(op: str) -> None:
    module = Calls(op)
    traced = torch.fx.symbolic_trace(module)
    assert _called(traced.graph) == [operator.add, getattr(functional, module.name), torch.relu]
    given = _operands(op)[1]["x"]
    found = []
    for run in (module, traced):
        x = given.clone().requires_grad_()
        module.zero_grad()
        y = run(x)
        y.backward(torch.ones_like(y))
        found.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    assert len(found[0]) > 2
    for got, want in zip(*found, strict=True):
        assert helpers.same_bits(got, want)


@pytest.mark.parametrize("op", OPS)
def test_every_tensor_operand_may_be_a_proxy_and_options_are_kept(op: str) -> None:
    name, given, _ = _operands(op)
    graph = torch.fx.Graph()
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    options = {} if op == "linear_add" else {"scaling": 0.5}
    for place in given:
        proxy = torch.fx.Proxy(graph.placeholder(place), tracer)
        getattr(functional, name)(**given | {place: proxy}, **options, backend="reference")
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    assert [node.target for node in nodes] == [getattr(functional, name)] * len(given)
    for node in nodes:
        assert node.kwargs == {"backend": "reference"}
        assert op == "linear_add" or node.args[-1] == 0.5


@pytest.mark.parametrize("op", OPS)
def test_a_mode_sees_one_call_and_may_answer_it(op: str) -> None:
    name, given, _ = _operands(op)
    function, seen = getattr(functional, name), []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, called, types, args=(), kwargs=None):
            seen.append(called)
            return called(*args, **(kwargs or {}))

    want = function(**given)
    with Watch():
        got = function(**given)
    assert seen == [function]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["qr", "lora_xs", "ohora"])
def test_a_layer_within_a_model_is_one_call_too(kind: str) -> None:
    """It is traced through, to its function on its own weights; a merged one as what it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    qk.adapt(model, ["0"], kind, rank=4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    function = {"qr": "qr_linear", "lora_xs": "lora_xs_linear", "ohora": "kron_linear"}[kind]
    traced = torch.fx.symbolic_trace(model)
    assert _called(traced.graph) == [getattr(functional, function)]
    x = torch.randn(5, 16)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    for run in (model, traced):
        y = run(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), trained)])
    for got, want in zip(*found, strict=True):
        assert helpers.same_bits(got, want)
