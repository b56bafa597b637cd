"""Subclasses of nn.Linear that no adapter can take over are refused by name, before any change."""

from __future__ import annotations

import pytest
import torch
from one_layer import adapt, x
from torch import nn


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class OwnForwardBelow(OwnForward):
    pass


class OwnCall(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class RankProperty(nn.Linear):
    @property
    def rank(self):
        return 1


class MergeMethod(nn.Linear):
    def merge(self):
        pass


class OptionsBuffer(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("options", torch.zeros(1))


class LamParameter(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.lam = nn.Parameter(torch.zeros(1))


class QAttribute(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.q = 1


class ScalingChild(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.scaling = nn.Identity()


class KindInClass(nn.Linear):
    kind = "mine"


class Sealed(nn.Linear):
    def __init_subclass__(cls):
        raise TypeError("Sealed has no subclasses")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OwnForward, "forward of its own"),
        (OwnForwardBelow, "forward of its own"),
        (RankProperty, "rank"),
        (MergeMethod, "merge"),
        (OptionsBuffer, "options"),
        (LamParameter, "lam"),
        (QAttribute, "q"),
        (ScalingChild, "scaling"),
        (KindInClass, "kind"),
        (Sealed, "Sealed has no subclasses"),
    ],
)
def test_subclasses_that_cannot_be_adapted_are_refused_by_name(kind, message):
    model = nn.Sequential(nn.Linear(8, 8), kind(8, 16))
    first, before = dict(vars(model[0])), dict(vars(model[1]))
    with pytest.raises(TypeError, match=rf"1 .*{kind.__name__}.*{message}"):
        adapt(model, targets=["0", "1"])
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is kind
    assert (vars(model[0]), vars(model[1])) == (first, before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["rank", "q", "scaling", "merged", "_options", "_start", "kind"])
def test_an_attribute_set_on_the_object_is_not_overwritten(name):
    model = nn.Sequential(nn.Linear(8, 16))
    vars(model[0])[name] = "mine"
    with pytest.raises(TypeError, match=rf"0 must not have names of its own.*{name}"):
        adapt(model)
    assert vars(model[0])[name] == "mine"


def test_a_call_of_its_own_goes_on():
    layer = nn.Sequential(OwnCall(8, 16))
    y = layer(x())
    adapt(layer, "lora_xs", init_std=0.0)
    assert torch.allclose(layer(x()), y, atol=1e-4)
