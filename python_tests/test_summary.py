"""What the table of a model says, and that it says it once."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import qrlora_kernels as qk
from qrlora_kernels.model import advice


def model(adapter="qr", **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 48), nn.Linear(48, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return qk.adapt(net, ["0", "1"], adapter, progress=False, **options)


def test_printing_what_summary_returned_does_not_repeat_the_table(capsys):
    print(qk.summary(model(rank=4)))
    assert capsys.readouterr().out.count("48x64") == 1


def test_unshown_it_prints_as_a_table():
    text = str(qk.summary(model(rank=4), show=False))
    assert "64x48" in text
    assert "48x64" in text


def test_bytes_are_those_of_the_tensors():
    net = model(rank=4)
    found = qk.summary(net, show=False)
    for row, layer in zip(found.layers, (net[0], net[1]), strict=True):
        held = (getattr(layer, key) for key in layer.factors)
        assert row.factor_bytes == sum(t.numel() * t.element_size() for t in held)
        assert row.weight_bytes == 48 * 64 * 4
    assert found.model_bytes == sum(p.numel() * 4 for p in net.parameters())
    assert "beside a model of" in str(found)


def test_a_rank_that_stands_out_is_marked():
    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(5)))
    qk.adapt(net, ["0", "1", "2", "3"], rank=4, progress=False)
    qk.adapt(net, ["4"], rank=16, progress=False)
    text = str(qk.summary(net, show=False))
    assert text.count("16*") == 1
    assert "4*" not in text
    assert "ranks far from the median, 4" in text


@pytest.mark.parametrize("adapter", ["qr", "lora_xs", "ohora"])
def test_the_rate_to_train_at_is_there(adapter):
    options = {} if adapter == "ohora" else {"rank": 4}
    text = str(qk.summary(model(adapter, **options), show=False))
    assert f"train {adapter} at about {advice.RATES[adapter][0]:g}" in text


def test_each_backend_and_its_reason_are_told_once_with_the_tokens():
    text = str(qk.summary(model(rank=4), tokens=9, show=False))
    assert text.count("backend at 9 tokens") == 1
    assert "for 2 of 2 layers" in text


def test_a_base_that_changed_is_named():
    net = model(rank=4)
    assert "refresh" not in str(qk.summary(net, show=False))
    with torch.no_grad():
        net[1].weight.add_(1.0)
    text = str(qk.summary(net, show=False))
    assert "the weights of 1 are not those" in text
    assert "qk.refresh(model)" in text


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"tau": 0.01}, True),
        ({"tau": 0.99}, False),
        ({"tau": 0.9, "rank_rule": "energy"}, True),
        ({"tau": 0.01, "rank_rule": "energy"}, False),
        ({"tau": 0.01, "max_rank": 4}, False),
        ({"rank": 40}, False),
    ],
)
def test_a_rule_that_gives_large_factors_is_worth_a_warning(options, warned):
    """A fixed rank is what the user asked for."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 48))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qk.adapt(net, ["0", "1"], progress=False, **options)
    told = [str(w.message) for w in caught if "the rank rule keeps" in str(w.message)]
    assert len(told) == warned
    factors = sum(layer.q.numel() + layer.r.numel() for layer in net)
    assert (factors > net[0].weight.numel() * 2 / 3) == warned or "rank" in options
