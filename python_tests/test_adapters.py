"""The adapters without a module; a layer holds their tensors and computes no other way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels import adapters
from qrlora_kernels.adapters import AnyAdapter, Options, State
from qrlora_kernels.linalg import StartRunner
from qrlora_kernels.nn import ADAPTERS, AdapterLinear

N, K, RANK = 24, 16, 4


@dataclass(frozen=True)
class Held:
    """An adapter's tensors as a holder of its own keeps them, away from their start."""

    adapter: AnyAdapter
    options: Options
    linear: nn.Linear
    state: State

    @property
    def strength(self) -> float:
        return self.options.scaling_of(self.adapter.rank(self.state)) * self.options.strength

    @property
    def operands(self) -> State:
        """Nothing else of the state is needed by the update."""
        return {name: self.state[name] for name in self.adapter.operands}

    def layer(self) -> AdapterLinear:
        kind = ADAPTERS[self.adapter.kind]
        return kind.from_state(self.linear, self.options, self.state).eval()


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qr": ("qr", {"rank": RANK, "scaling": 0.5}),
    "lora_xs": ("lora_xs", {"rank": RANK, "alpha": 2.0}),
    "lora_xs out": ("lora_xs", {"rank": RANK, "sigma": "out"}),
    "ohora": ("ohora", {"columns": "selected"}),
    "ohora materialised": ("ohora", {"columns": "selected", "product": "materialised"}),
    "ohora lora": ("ohora", {"rank": RANK, "product": "lora", "strength": 0.5}),
}
each = pytest.mark.parametrize("case", CASES)
FUSED = [case for case, (_, options) in CASES.items() if "product" not in options]


def held(case: str, dtype: torch.dtype = torch.float64) -> Held:
    torch.manual_seed(0)
    linear = nn.Linear(K, N, dtype=dtype)
    kind, values = CASES[case]
    adapter = adapters.ADAPTERS[kind]
    options = adapter.options_type(**values)
    state = adapter.start({"x": linear.weight.detach()}, options, StartRunner())["x"]
    for name in adapter.trainables:
        state[name] = state[name].to(dtype) + 0.1 * torch.randn(state[name].shape, dtype=dtype)
    return Held(adapter, options, linear, state)


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1), dtype=dtype)


@each
def test_names(case):
    one = held(case)
    own = {*one.adapter.trainables, *one.adapter.factors}
    assert set(one.state) == own
    assert set(one.adapter.operands) <= own
    assert {*one.adapter.rebuilt_from, *one.adapter.kept_fp32} <= set(one.adapter.factors)
    assert set(one.layer()._tensors()) == set(one.adapter.operands)
    assert one.adapter.can_train(one.state)


@each
def test_update_delta_and_factors_are_one_thing(case):
    one = held(case)
    delta = one.adapter.delta(one.operands, one.options, one.strength)
    update = one.adapter.update(tokens(), one.operands, one.options, one.strength)
    assert delta.abs().max() > 1e-3
    torch.testing.assert_close(update, tokens() @ delta.T)
    if case in ("ohora", "ohora materialised"):
        with pytest.raises(TypeError, match="not low-rank"):
            one.adapter.lora_factors(one.operands, one.options, one.strength)
    else:
        a, b = one.adapter.lora_factors(one.operands, one.options, one.strength)
        torch.testing.assert_close(b @ a, delta)


@each
def test_every_update_is_fused_but_for_other_products(case):
    one = held(case)
    assert one.adapter.fuses(one.options) == (case in FUSED)


@pytest.mark.parametrize("case", FUSED)
def test_the_fused_call_is_base_and_update(case):
    one = held(case)
    weight, bias = one.linear.weight.detach(), one.linear.bias.detach()
    delta = one.adapter.delta(one.operands, one.options, one.strength)
    y = one.adapter.fused(tokens(), weight, bias, one.operands, one.strength)
    torch.testing.assert_close(y, F.linear(tokens(), weight + delta, bias))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_has_the_same_bits(case, dtype):
    one = held(case, dtype)
    layer, x = one.layer(), tokens(dtype)
    held_by_layer = layer._tensors()
    bias = one.linear.bias.detach()
    if one.adapter.fuses(one.options):
        want = one.adapter.fused(x, layer.weight, bias, held_by_layer, one.strength)
    else:
        update = one.adapter.update(x, held_by_layer, one.options, one.strength)
        want = qk.functional.linear_add(x, layer.weight, bias, update)
    assert torch.equal(layer(x), want)
    delta = one.adapter.delta(held_by_layer, one.options, one.strength)
    assert torch.equal(layer.delta_weight(), delta)
    assert layer.rank == one.adapter.rank(held_by_layer)
    energy = one.adapter.energy(layer.weight, held_by_layer, one.options)
    assert layer.energy_kept() == energy
    assert (energy is None) == (one.adapter.kind == "ohora")


@each
def test_rebuilt_from_what_a_file_keeps(case):
    one = held(case)
    kept = {name: one.state[name] for name in one.adapter.rebuilt_from}
    before = torch.random.get_rng_state()
    factors = one.adapter.rebuild(one.linear.weight.detach(), one.options, kept)
    assert set(factors) == set(one.adapter.factors)
    assert all(torch.equal(factors[name], one.state[name]) for name in factors)
    assert torch.equal(torch.random.get_rng_state(), before)


@each
def test_errors_name_the_weight(case):
    one = held(case)
    bad = one.linear.weight.detach().clone()
    bad[0, 0] = torch.nan
    weights = {"first": one.linear.weight.detach(), "second": bad}
    with pytest.raises(ValueError, match=r"second\.weight must be finite"):
        one.adapter.start(weights, one.options, StartRunner())
    zeros = {"first": torch.zeros(N, K)}
    with pytest.raises(ValueError, match=r"first\.weight"):
        one.adapter.start(zeros, one.options, StartRunner())


# --- the basis of gradients


def with_gradients() -> tuple[nn.Linear, Options]:
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    linear(torch.randn(5, K)).square().sum().backward()
    return linear, adapters.LoRAXSOptions(rank=RANK, basis="gradient")


def test_gradients_are_handed_in():
    linear, options = with_gradients()
    assert adapters.LoRAXS.needs_gradients(options)
    state = adapters.LoRAXS.start(
        {"x": linear.weight.detach()}, options, StartRunner(), {"x": linear.weight.grad}
    )["x"]
    layer = qk.LoRAXSLinear.from_linear(linear, RANK, basis="gradient")
    assert torch.equal(state["a"], layer.a)
    assert torch.equal(state["b"], layer.b)


@pytest.mark.parametrize("gradients", [None, {}, {"x": None}, {"y": torch.ones(N, K)}], ids=str)
def test_gradients_that_are_not_there_are_named(gradients):
    linear, options = with_gradients()
    with pytest.raises(ValueError, match=r"in x\.weight\.grad .*, got None"):
        adapters.LoRAXS.start({"x": linear.weight.detach()}, options, StartRunner(), gradients)


def test_a_bad_weight_beside_its_gradient_is_named():
    """A position in a list of weights and gradients is no name."""
    linear, options = with_gradients()
    weight = linear.weight.detach().clone()
    weight[0, 0] = torch.inf
    weights = {"x": linear.weight.detach(), "y": weight}
    gradients = dict.fromkeys(weights, linear.weight.grad)
    with pytest.raises(ValueError, match=r"y\.weight must be finite"):
        adapters.LoRAXS.start(weights, options, StartRunner(), gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("adapter", ["QR", "LoRAXS", "OHoRA"])
def test_what_a_start_gives_is_what_a_call_takes(adapter, dtype):
    """Trainables came in fp64, or in fp32 over fp64, which no call takes."""
    kind = getattr(adapters, adapter)
    weight = torch.randn(N, K, dtype=torch.float64).to(dtype)
    state = kind.start({"x": weight}, kind.options_type(rank=RANK), StartRunner())["x"]
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    assert {state[name].dtype for name in kind.trainables} == {wide}
    x = torch.randn(3, K, dtype=torch.float64).to(dtype)
    y = kind.fused(x, weight, None, state, 1.0)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().mT, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@each
def test_the_outline_has_the_shapes_and_dtypes_of_the_start(case, dtype):
    kind, values = CASES[case]
    adapter = adapters.ADAPTERS[kind]
    options = adapter.options_type(**values)
    weight = torch.randn(N, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = adapter.start({"x": weight.to(dtype)}, options, StartRunner())["x"]
    outline = adapter.outline(weight.to(dtype), options)
    assert {name: (t.shape, t.dtype) for name, t in outline.items()} == {
        name: (t.shape, t.dtype) for name, t in state.items()
    }
    assert all(tensor.is_meta for tensor in outline.values())


def test_a_rank_by_tau_has_no_outline():
    options = adapters.QR.options_type(tau=0.5)
    assert adapters.QR.outline(torch.randn(N, K), options) is None
