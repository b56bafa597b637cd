"""What would change the answer of a model that is ``disabled`` is refused before it does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qrlora_kernels as qk

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


def adapted(adapter="qr", names=("0",)):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)).eval()
    qk.adapt(net, list(names), adapter, rank=4, progress=False)
    with torch.no_grad():
        for layer in qk.adapted_layers(net).values():
            for name in layer.trainables:
                getattr(layer, name).add_(0.3)
    return net


CHANGES = {
    "merge": lambda model, path: qk.merge(model),
    "a layer's merge": lambda model, path: model[0].merge(),
    "unload": lambda model, path: qk.unload(model),
    "adapt": lambda model, path: qk.adapt(model, ["2"], "qr", rank=4, progress=False),
    "load_adapter": lambda model, path: qk.load_adapter(model, path),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_would_bring_an_update_in_is_refused(change, tmp_path):
    qk.save_adapter(adapted("ohora"), tmp_path)
    model = adapted()
    answer = model(X)
    with qk.disabled(model):
        base = model(X)
        with pytest.raises(
            ValueError, match=r"adapters that are on, got some that qk\.disabled has"
        ):
            change(model, tmp_path)
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), answer)
    change(model, tmp_path)  # allowed again


def test_what_keeps_the_base_goes_on(tmp_path):
    """The same adapter's numbers from a file, a fresh start, and taking it off."""
    qk.save_adapter(adapted(), tmp_path)
    model = adapted()
    with qk.disabled(model):
        base = model(X)
        for change in (
            lambda: qk.load_adapter(model, tmp_path),
            lambda: qk.refresh(model),
            lambda: qk.unload(model, merge=False),
        ):
            change()
            assert torch.equal(model(X), base)
    assert torch.equal(model(X), base)
    assert not [name for name in vars(model[0]) if name.startswith("_off")]
