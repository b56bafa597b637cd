"""Which weights nothing is merged into."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import qrlora_kernels as qk

ADAPTERS = {"qr": {"rank": 3}, "lora_xs": {"rank": 3}, "ohora": {}}

RECOMPUTED = {
    "identity": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "hook": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", RECOMPUTED)
def test_a_weight_that_is_computed_anew_is_not_merged(kind, adapter):
    """A pruned one broke in its next forward, a parametrised one raised KeyError half-way."""
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)).double()
    qk.adapt(model, ["0", "1"], adapter, progress=False, **ADAPTERS[adapter])
    RECOMPUTED[kind](model[1])
    model.eval()
    x = torch.randn(3, 12, dtype=torch.float64)
    before = model(x)
    for way in (qk.merge, lambda model: model[1].merge()):
        with pytest.raises(ValueError, match="weight must be a parameter to be merged"):
            way(model)
        assert torch.equal(model(x), before)
        assert not any(layer.merged for layer in qk.adapted_layers(model).values())
