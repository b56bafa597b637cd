"""A state dict means the same numbers only with the options that it was made with."""

from __future__ import annotations

import io

import helpers
import pytest
import torch
from saved import ADAPTERS, moved, x

import qrlora_kernels as qk

OTHER = {
    "qr": {"scaling": 4.0},
    "lora_xs": {"alpha": 32.0},
    "ohora": {"alpha": 16.0},
}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", [through_a_file, lambda state: state], ids=["file", "memory"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_state_of_another_strength_is_refused_by_the_options_name(adapter, way):
    """alpha 32 into alpha 4: all keys matched, and another model."""
    saved, resumed = moved(adapter, **OTHER[adapter]), moved(adapter)
    before = resumed(x())
    (option,) = OTHER[adapter]
    state = saved.state_dict()
    with pytest.raises(RuntimeError, match=f"0 was made with {option} .* state dict with {option}"):
        resumed.load_state_dict(way(state))
    assert resumed[0].options != saved[0].options
    with torch.no_grad():
        resumed[3].load_state_dict(moved(adapter)[3].state_dict())
    assert helpers.same_bits(resumed(x()), before)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_strength_set_later_is_part_of_the_state(adapter):
    saved, resumed = qk.scale(moved(adapter), 0.5), moved(adapter)
    with pytest.raises(RuntimeError, match=r"strength 1\.0, and the state dict with strength 0\.5"):
        resumed.load_state_dict(saved.state_dict())
    qk.scale(resumed, 0.5).load_state_dict(saved.state_dict())
    assert helpers.same_bits(resumed(x()), saved(x()))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_state_of_the_same_options_gives_the_same_model(adapter):
    saved, resumed = moved(adapter), moved(adapter)
    with torch.no_grad():
        for layer in qk.adapted_layers(saved).values():
            for name in layer.trainables:
                getattr(layer, name).add_(0.3)
    resumed.load_state_dict(through_a_file(saved.state_dict()))
    assert helpers.same_bits(resumed(x()), saved(x()))
    assert not any(layer.base_changed() for layer in qk.adapted_layers(resumed).values())
