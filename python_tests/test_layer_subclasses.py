"""Subclasses of nn.Linear keep what they are under an adapter, or are refused by name."""

from __future__ import annotations

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from one_layer import ADAPTERS, adapt, move, x
from torch import nn

import qrlora_kernels as qk


class WithAttributes(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.temperature = 2.0
        self.register_buffer("seen", torch.tensor(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def described(self) -> str:
        return f"{self.temperature} {int(self.seen)}"

    def extra_repr(self) -> str:
        return super().extra_repr() + ", mine"


class WithSlots(nn.Linear):
    __slots__ = ("note",)

    def __init__(self, *args):
        super().__init__(*args)
        self.note = "kept"


class Registered(type):
    known: ClassVar[list[str]] = []

    def __new__(cls, name, bases, space):
        cls.known.append(name)
        return super().__new__(cls, name, bases, space)


class WithMetaclass(nn.Linear, metaclass=Registered):
    pass


class WithChild(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.child = nn.LayerNorm(4)
        self.extra = nn.Parameter(torch.ones(3))


class WithApply(nn.Linear):
    applied = 0

    def _apply(self, fn, recurse=True):
        self.applied += 1
        return super()._apply(fn, recurse)


class WithLoading(nn.Linear):
    loaded = 0

    def _load_from_state_dict(self, *args):
        self.loaded += 1
        return super()._load_from_state_dict(*args)


class WithState(nn.Linear):
    def __getstate__(self):
        return super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__

    def get_extra_state(self):
        return {"mine": 1}

    def set_extra_state(self, state):
        self.got = state


class WithInit(nn.Linear):
    """Another signature than nn.Linear's."""

    def __init__(self, width: int):
        super().__init__(width, 2 * width)
        self.width = width


class WithProperty(nn.Linear):
    @property
    def fan(self) -> int:
        return self.in_features


class WithGetattr(nn.Linear):
    def __getattr__(self, name):
        return 7 if name == "seven" else super().__getattr__(name)


class WithReset(nn.Linear):
    def reset_parameters(self):
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)


class Quiet(nn.modules.linear.NonDynamicallyQuantizableLinear):
    pass


KINDS = [
    WithAttributes,
    WithSlots,
    WithMetaclass,
    WithChild,
    WithApply,
    WithLoading,
    WithState,
    WithProperty,
    WithGetattr,
    WithReset,
    Quiet,
]


def made(kind: type[nn.Linear]) -> nn.Linear:
    torch.manual_seed(0)
    return WithInit(8) if kind is WithInit else kind(8, 16)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", [*KINDS, WithInit])
def test_subclasses_keep_what_they_are_and_get_it_back(kind, adapter):
    model = nn.Sequential(made(kind))
    layer = model[0]
    before, y = dict(vars(layer)), layer(x())
    adapt(model, adapter)
    assert isinstance(layer, kind)
    assert isinstance(layer, qk.nn.AdapterLinear)
    assert torch.allclose(layer(x()), y, atol=1e-3)  # LoRA-XS starts with a small update
    move(layer)
    want = x() @ (layer.weight + layer.delta_weight()).T + layer.bias
    assert torch.allclose(layer(x()), want, rtol=1e-4, atol=1e-3)
    assert "rank=" in repr(layer)
    assert not layer.weight.requires_grad
    qk.unload(model, merge=False)
    assert type(layer) is kind
    assert vars(layer) == before
    assert torch.equal(layer(x()), y)


@pytest.mark.parametrize("kind", [*KINDS, WithInit])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_subclasses_are_copied_with_their_adapter(kind, way):
    model = adapt(nn.Sequential(made(kind)))
    move(model[0])
    other = way(model)
    assert type(other[0]) is type(model[0])
    assert torch.equal(other(x()), model(x()))
    assert type(qk.unload(other)[0]) is kind


def test_what_a_subclass_overrides_is_called():
    layer = adapt(nn.Sequential(made(WithAttributes)))[0]
    assert layer.described() == "2.0 3"
    assert "mine, rank=3" in repr(layer)
    assert {"seen"} <= layer.state_dict().keys()
    assert "scratch" not in layer.state_dict()
    layer = adapt(nn.Sequential(made(WithApply)))[0]
    layer.to(torch.float64)
    assert layer.applied == 1
    layer = adapt(nn.Sequential(made(WithLoading)))[0]
    layer.load_state_dict(layer.state_dict())
    assert layer.loaded == 1
    layer = adapt(nn.Sequential(made(WithState)))[0]
    layer.load_state_dict(layer.state_dict())
    assert layer.got == {"mine": 1}
    layer = adapt(nn.Sequential(made(WithSlots)))[0]
    assert layer.note == "kept"
    assert adapt(nn.Sequential(made(WithGetattr)))[0].seven == 7


def test_an_adapter_of_a_subclass_is_saved_and_loaded(tmp_path):
    model = adapt(nn.Sequential(made(WithAttributes)))
    move(model[0])
    qk.save_adapter(model, tmp_path / "a.safetensors")
    other = qk.load_adapter(nn.Sequential(made(WithAttributes)), tmp_path / "a.safetensors")
    assert torch.equal(other(x()), model(x()))


def test_from_linear_leaves_the_layer_it_was_given():
    linear = made(WithAttributes)
    before = dict(vars(linear))
    layer = qk.QRLinear.from_linear(linear, rank=3)
    assert type(linear) is WithAttributes
    assert vars(linear) == before
    assert layer.described() == "2.0 3"
    assert layer.weight is linear.weight
    layer.temperature = 1.0
    layer.register_buffer("new", torch.zeros(1))
    assert linear.temperature == 2.0
    assert "new" not in linear._buffers
