"""The owner of derived tensors by itself: names, and what it holds of its sources."""

from __future__ import annotations

import copy
import weakref

import torch
from torch import nn

import qrlora_kernels as qk
from qrlora_kernels.nn.derived import Derived


def test_values_are_dropped_by_name():
    derived, source = Derived(), torch.ones(2)
    for name in ("one", "two", "three"):
        derived.get(name, torch.clone, source)
    derived.drop("two", "never there")
    assert derived.nbytes() == {"one": 8, "three": 8}
    derived.drop()
    assert derived.nbytes() == {}


def test_no_source_is_kept_alive():
    derived, source = Derived(), torch.ones(2)
    derived.get("sum", torch.sum, source)
    gone = weakref.ref(source)
    del source
    assert gone() is None


def test_a_source_in_the_place_of_one_that_is_gone():
    """Of the same address, memory and count of writes."""
    derived, memory = Derived(), torch.ones(2)
    for total in (2.0, 4.0, 6.0):
        view = memory.data
        assert derived.get("sum", torch.sum, view) == total
        del view
        memory.add_(1)


def test_parameters_may_be_swapped_by_a_load(monkeypatch):
    """PyTorch swaps no tensor that something refers to weakly."""
    model = qk.adapt(
        nn.Sequential(nn.Linear(24, 16)), ["0"], "ohora", rank=4, columns="selected", fold=True
    )
    state, x = copy.deepcopy(model.state_dict()), torch.randn(3, 24)
    with torch.no_grad():
        want = model(x)
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model.load_state_dict(state)
    assert torch.equal(model(x), want)
