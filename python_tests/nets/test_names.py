"""The names under which layers keep their tensors, which files and optimizers hold on to."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import qrlora_kernels as qk
from qrlora_kernels.nn import AdapterLinear

BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 4),
    "linear without bias": lambda: nn.Linear(6, 4, bias=False),
    "conv1d": lambda: Conv1D(4, 6),
}


class Names(NamedTuple):
    """What a layer holds beside weight and bias, each in its order.

    Factors are plain attributes that the state dict holds: as buffers, every step of a training on
    several ranks would send them.
    """

    trained: tuple[str, ...]
    factors: tuple[str, ...]


OUTPUT: dict[str, Any] = {"factors": "output"}
LAYERS: dict[str, tuple[type[AdapterLinear], dict[str, Any], Names]] = {
    "qr": (qk.QRLinear, {}, Names(("lam",), ("q", "r", "pivots", "diagonal"))),
    "qr output": (qk.QRLinear, OUTPUT, Names(("lam",), ("q", "pivots", "diagonal"))),
    "lora_xs": (qk.LoRAXSLinear, {}, Names(("core",), ("a", "b"))),
    "ohora": (qk.OHoRALinear, {}, Names(("a", "b"), ("a0", "b0"))),
    "ohora folded": (qk.OHoRALinear, {"fold": True}, Names(("a", "b"), ("a0", "b0"))),
}
each = pytest.mark.parametrize(("kind", "base"), list(product(LAYERS, BASES)))
merged_or_not = pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])


def layer(kind: str, base: str, merged: bool = False) -> AdapterLinear:
    torch.manual_seed(0)
    adapter, options, _ = LAYERS[kind]
    made = adapter.from_linear(BASES[base](), rank=2, **options)
    made(torch.zeros(1, 6))  # which may compute tensors and keep them
    if merged:
        made.merge()
    return made


def check_names(made: AdapterLinear, kind: str, base: str) -> None:
    names = LAYERS[kind][2]
    own = ("weight",) if base == "linear without bias" else ("weight", "bias")
    assert tuple(dict(made.named_parameters())) == (*own, *names.trained)
    asking = [name for name, p in made.named_parameters() if p.requires_grad]
    assert tuple(asking) == names.trained
    assert tuple(dict(made.named_buffers())) == ()
    kept = {name for name, value in vars(made).items() if isinstance(value, torch.Tensor)}
    assert kept == set(names.factors)
    saved = () if made.merged else (*names.trained, *names.factors)
    assert tuple(made.state_dict()) == (*own, *saved)
    assert dict(made.named_children()) == {}


@merged_or_not
@each
def test_names(kind: str, base: str, merged: bool) -> None:
    check_names(layer(kind, base, merged), kind, base)


@merged_or_not
@each
def test_the_weight_of_a_state_dict(kind: str, base: str, merged: bool) -> None:
    """A merged layer's is the merged one: who writes a merged model wants its update in it."""
    made = layer(kind, base)
    with torch.no_grad():
        for name in LAYERS[kind][2].trained:
            getattr(made, name).add_(1.0)
    before = made.weight
    if merged:
        made.merge()
        assert not torch.equal(made.weight, before)
    assert torch.equal(made.state_dict()["weight"], made.weight)
    assert tuple(before.shape) == ((6, 4) if base == "conv1d" else (4, 6))


@merged_or_not
@each
def test_a_state_dict_is_loaded(kind: str, base: str, merged: bool) -> None:
    """Into any layer of the kind, every tensor of it; a merged one is unmerged first."""
    source, target = layer(kind, base), layer(kind, base, merged)
    state = {name: t + 1 if t.is_floating_point() else t for name, t in source.state_dict().items()}
    target.load_state_dict(state)
    assert not target.merged
    loaded = target.state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in state.items())
    check_names(target, kind, base)


@each
def test_taking_off_leaves_the_base_names(kind: str, base: str) -> None:
    made = layer(kind, base)
    for merge in (False, True):
        plain = made.to_linear(merge)
        assert type(plain) is type(BASES[base]())
        assert tuple(plain.state_dict()) == tuple(BASES[base]().state_dict())


# --- planted faults


def test_a_new_buffer_is_seen() -> None:
    made = layer("qr", "linear")
    made.register_buffer("packed", torch.zeros(1), persistent=True)
    with pytest.raises(AssertionError):
        check_names(made, "qr", "linear")


def test_a_derived_tensor_in_the_layer_itself_is_seen() -> None:
    made = layer("ohora folded", "linear")
    vars(made)["kept"] = made.folded
    with pytest.raises(AssertionError):
        check_names(made, "ohora folded", "linear")


def test_another_order_of_parameters_is_seen() -> None:
    """An optimizer's state goes by the position."""
    made = layer("ohora", "linear")
    made._parameters["a"] = made._parameters.pop("a")
    with pytest.raises(AssertionError):
        check_names(made, "ohora", "linear")
