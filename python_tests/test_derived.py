"""What a layer computes from its frozen tensors follows them, and is nowhere that they are not.

OHoRA's fold shows it: W − s A₀ ⊗ B₀ᵀ, in the place of W. A fold that stayed behind would give the
old weight's answers without a word.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from offloaded_net import adapted, offloaded
from offloaded_net import x as tokens_of_net
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import qrlora_kernels as qk

N = 16  # of a square weight, which has a transpose to be mistaken for
HELD = {"folded": N * N * 8}
Layer = qk.OHoRALinear


def x() -> Tensor:
    return torch.randn(5, N, generator=torch.Generator().manual_seed(1)).double()


def folded(base: Callable[[], nn.Module] = lambda: nn.Linear(N, N)) -> Layer:
    """A layer away from its start, whose fold is there."""
    torch.manual_seed(0)
    layer = Layer.from_linear(base().double(), columns="selected", fold=True).eval()
    with torch.no_grad():
        layer.a.add_(0.1)
    layer(x())
    assert layer.derived.nbytes() == HELD
    return layer


def expected(layer: Layer) -> Tensor:
    """From the tensors that are there now."""
    matrix = layer.base_weight.t() if layer.conv1d else layer.base_weight
    return F.linear(x(), matrix + layer.delta_weight().to(matrix.dtype), layer.bias)


def answers(layer: Layer) -> None:
    torch.testing.assert_close(layer(x().to(layer.weight.dtype)), expected_in(layer))


def expected_in(layer: Layer) -> Tensor:
    wide = copy.deepcopy(layer).double()
    wide.unmerge()
    return expected(wide).to(layer.weight.dtype)


def other() -> Tensor:
    return torch.randn(N, N, generator=torch.Generator().manual_seed(2)).double()


@pytest.mark.parametrize("base", [lambda: nn.Linear(N, N), lambda: Conv1D(N, N)])
def test_computed_at_first_use_and_kept(base):
    layer = folded(base)
    first = layer.folded
    answers(layer)
    assert layer.folded is first
    layer.derived.drop()
    assert layer.derived.nbytes() == {}
    assert layer.folded is not first
    assert torch.equal(layer.folded, first)


# --- events after which it is gone


def _merge(layer):
    layer.merge()


def _unmerge(layer):
    layer.merge()
    layer.unmerge()


def _load(layer):
    layer.load_state_dict({n: t * 2 for n, t in layer.state_dict().items()})


def _load_the_weight_alone(layer):
    layer.load_state_dict({"weight": other()}, strict=False)


def _load_by_assignment(layer):
    state = {n: t * 2 for n, t in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def _refresh(layer):
    layer.weight.data.mul_(2)
    qk.refresh(layer)


def _assign(layer):
    layer.weight = nn.Parameter(other(), requires_grad=False)


@pytest.mark.parametrize(
    "event",
    [
        _merge,
        _unmerge,
        nn.Module.float,
        nn.Module.share_memory,
        nn.Module.cpu,
        _load,
        _load_the_weight_alone,
        _load_by_assignment,
        _refresh,
        _assign,
    ],
    ids=lambda event: event.__name__.strip("_"),
)
def test_dropped_by(event):
    layer = folded()
    event(layer)
    assert layer.derived.nbytes() == {}
    answers(layer)


def test_dropped_before_a_cast_converts_anything():
    layer, seen = folded(), []
    layer._apply(lambda t: seen.append(layer.derived.nbytes()) or t)
    assert seen
    assert not any(seen)


def test_taken_off_with_the_adapter():
    model = nn.Sequential(folded())
    qk.unload(model, merge=False)
    assert "derived" not in vars(model[0])


# --- events that the next use sees


@torch.no_grad()
def _write(layer, name):
    getattr(layer, name).mul_(2)


def _data(layer, name):
    getattr(layer, name).data = getattr(layer, name).data * 2


def _view(layer, name):
    tensor = getattr(layer, name)
    tensor.data = tensor.data.flip(0).clone() if name != "weight" else tensor.data.t()


def _replace(layer, name):
    if name == "weight":
        layer._parameters[name] = nn.Parameter(other(), requires_grad=False)
    else:
        setattr(layer, name, getattr(layer, name) * 2)


@pytest.mark.parametrize("name", ["weight", "a0", "b0"])
@pytest.mark.parametrize("event", [_write, _data, _view, _replace])
def test_seen_by_the_next_use(event, name):
    layer = folded()
    event(layer, name)
    answers(layer)


def test_another_strength_is_seen():
    layer = folded()
    layer.scaling = 0.25
    answers(layer)
    qk.scale(layer, 3.0)
    answers(layer)


def test_tensors_of_one_call_are_told_apart():
    """Each in the place, as object and in memory, of the one before, which is gone."""
    layer = folded()
    for seed in range(5):
        torch.manual_seed(seed)
        weight = torch.randn(N, N).double()
        want = F.linear(x(), weight + layer.delta_weight(), layer.bias)
        got = torch.func.functional_call(layer, {"weight": weight}, x())
        torch.testing.assert_close(got, want)
        del weight


def test_memory_that_was_given_back_is_told_apart():
    """The second replacement may lie where the first has left."""
    layer = folded()
    for seed in range(20):
        for value in (0.5, seed + 1.0):
            layer.weight.data = torch.full((N, N), value, dtype=torch.float64)
        answers(layer)


def test_a_parameter_over_the_same_memory_counts_writes_of_its_own():
    layer = folded()
    before = layer.weight
    assert before._version > 0  # from its initialisation
    with torch.no_grad():
        layer(x())
        other_over_it = nn.Parameter(before.data, requires_grad=False)
        for _ in range(before._version):
            other_over_it.add_(1)
    assert other_over_it._version == before._version
    layer._parameters["weight"] = other_over_it
    answers(layer)


def test_a_write_that_pytorch_does_not_count_is_seen_after_a_drop():
    layer = folded()
    layer.weight.data.add_(1)
    layer.derived.drop("folded")
    answers(layer)


# --- copies and files


def _saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer)), _saved],
    ids=["deepcopy", "copy", "pickle", "save"],
)
def test_a_copy_starts_empty(copied):
    layer = folded()
    y = layer(x())
    made = copied(layer)
    assert made.derived is not layer.derived
    assert made.derived.nbytes() == {}
    assert layer.derived.nbytes() == HELD
    assert torch.equal(made(x()), y)


def test_in_no_state_and_no_list():
    layer = folded()
    ours = layer.folded
    held = [*layer.state_dict().values(), *layer.parameters(), *vars(layer).values()]
    assert not any(tensor is ours for tensor in held)
    assert dict(layer.named_buffers()) == {}
    assert set(layer.state_dict()) == {"weight", "bias", "a", "b", "a0", "b0"}


def test_the_summary_counts_it(capsys):
    model = nn.Sequential(folded())
    found = qk.summary(model)
    assert found.layers[0].derived_bytes == HELD["folded"]
    assert "copies computed from frozen tensors take 2.0 KiB more" in capsys.readouterr().out
    model[0].derived.drop()
    assert "copies" not in str(qk.summary(model))


# --- calls that go without it


def plant(layer: Layer) -> None:
    """Let the kept fold be NaN."""
    layer.derived.drop()
    sources = layer.weight, layer.a0, layer.b0
    layer.derived.get("folded", lambda weight, *_: weight * torch.nan, *sources)


def unused_by(layer: Layer, call: Callable[[], Tensor]) -> None:
    plant(layer)
    torch.testing.assert_close(call(), expected(layer))


def test_a_planted_value_is_taken_by_a_plain_call():
    layer = folded()
    plant(layer)
    assert layer(x()).isnan().all()


def test_unused_in_a_compiled_call():
    layer = folded()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    unused_by(layer, lambda: compiled(x()))


def test_unused_in_a_trace():
    layer = folded()
    # Its check makes a plain call too.
    unused_by(layer, lambda: torch.jit.trace(layer, x(), check_trace=False)(x()))


def test_unused_in_an_exported_program():
    layer = folded()
    unused_by(layer, lambda: torch.export.export(layer, (x(),)).module()(x()))


def test_unused_in_a_transform():
    layer = folded()
    unused_by(layer, lambda: torch.func.vmap(layer)(x()))


def test_unused_under_a_dispatch_mode():
    layer = folded()

    def counted() -> Tensor:
        with FlopCounterMode(display=False):
            return layer(x())

    unused_by(layer, counted)


def test_unused_under_autocast():
    layer = folded()

    def cast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x())

    unused_by(layer, cast)


def test_unused_where_a_source_asks_for_a_gradient():
    layer = folded().train()
    unused_by(layer, lambda: layer.requires_grad_()(x()))
    layer(x()).sum().backward()
    want = torch.ones(5, N).double().t() @ x()
    torch.testing.assert_close(layer.weight.grad, want)
    layer.derived.drop()
    layer(x())
    assert layer.derived.nbytes() == {}


def test_unused_where_a_source_counts_no_writes():
    layer = folded()
    with torch.inference_mode():
        layer.a0 = layer.a0.clone()
    assert layer.folded is None
    with torch.no_grad():
        torch.testing.assert_close(layer(x()), expected(layer))


def test_unused_over_a_weight_that_is_computed_anew():
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer = folded()
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    assert layer.folded is None
    torch.testing.assert_close(layer(x()), expected(layer))


def test_unused_over_a_weight_that_is_kept_away(tmp_path):
    """It comes in as another tensor each time: a fold would be computed at every call."""
    model = adapted(offloaded("cpu", tmp_path), "ohora")
    away = model.down
    away.options = type(away.options)(**(away.options.to_dict() | {"fold": True}))
    model(tokens_of_net())
    assert away.folded is None
    assert away.derived.nbytes() == {}


def test_computed_in_inference_mode_and_trained_with():
    layer = folded()
    layer.derived.drop()
    with torch.inference_mode():
        layer(x())
    assert layer.derived.nbytes() == HELD
    inputs = x().requires_grad_()
    layer.train()(inputs).sum().backward()
    assert inputs.grad is not None
    assert layer.a.grad is not None
