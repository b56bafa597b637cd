"""What several calls ask of one model adds up; names are read once, by any of a weight's names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qrlora_kernels as qk

ADAPTERS = {"qr": {"rank": 2}, "lora_xs": {"rank": 2}, "ohora": {}}


def chain():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))


def adapt(model, targets, adapter="qr", **options):
    return qk.adapt(model, targets, adapter, progress=False, **{**ADAPTERS[adapter], **options})


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("second", list(ADAPTERS))
@pytest.mark.parametrize("first", list(ADAPTERS))
def test_a_second_adapt_adds_to_the_first(first, second, tmp_path):
    """The second froze what the first was told to train, and the file lacked it."""
    model = adapt(chain(), ["0"], first, trainable=["2"])
    before = trained(model)
    model[4].bias.requires_grad_(True)
    adapt(model, ["1"], second, trainable=["3"])
    own = {f"1.{name}" for name in qk.adapted_layers(model)["1"].trainables}
    want = before | own | {"4.bias", "3.weight", "3.bias"}
    assert trained(model) == want
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    qk.save_adapter(model, tmp_path / "a.safetensors")
    other = qk.load_adapter(chain(), tmp_path / "a.safetensors")
    assert trained(other) == want
    x = torch.randn(3, 16)
    assert torch.equal(other(x), model(x))


def test_a_layer_adapted_later_trains_by_its_adapter_alone():
    model = adapt(chain(), ["0"], trainable=["1"])
    adapt(model, ["1"])
    assert trained(model) == {"0.lam", "1.lam"}


def test_an_adapter_that_the_user_froze_stays_frozen():
    model = adapt(chain(), ["0"])
    model[0].lam.requires_grad_(False)
    adapt(model, ["1"])
    assert trained(model) == {"1.lam"}


def test_a_module_added_between_the_calls_goes_on_training():
    model = adapt(chain(), ["0"])
    model.append(nn.Linear(16, 2))
    adapt(model, ["1"])
    assert trained(model) == {"0.lam", "1.lam", "5.weight", "5.bias"}


def test_after_load_adapter_too(tmp_path):
    qk.save_adapter(adapt(chain(), ["0"], trainable=["2"]), tmp_path / "a.safetensors")
    model = qk.load_adapter(chain(), tmp_path / "a.safetensors")
    adapt(model, ["1"], "lora_xs")
    assert trained(model) == {"0.lam", "1.core", "2.weight", "2.bias"}


def test_through_a_part_of_the_model():
    model = nn.ModuleDict({"body": chain(), "head": nn.Linear(16, 2)})
    adapt(model["body"], ["0"], trainable=["2"])
    adapt(model, ["body.1"])
    want = {"body.0.lam", "body.1.lam", "body.2.weight", "body.2.bias"}
    assert trained(model) == want | {"head.weight", "head.bias"}
    qk.unload(model)
    assert trained(model) == {n for n, _ in model.named_parameters()}


def test_a_call_that_is_refused_changes_nothing():
    model = adapt(chain(), ["0"], trainable=["2"])
    before = trained(model)
    for targets, trainable in [(["1"], ["0"]), (["1"], ["0.weight"]), (["1"], ["1"])]:
        with pytest.raises(ValueError, match="trainable must not reach the weight of an adapted"):
            adapt(model, targets, trainable=trainable)
    with pytest.raises(ValueError, match="0 is adapted already"):
        adapt(model, ["1", "0"])
    with pytest.raises(ValueError, match="rank"):
        adapt(model, ["1"], rank=99)
    assert trained(model) == before
    assert list(qk.adapted_layers(model)) == ["0"]


def test_unload_gives_back_what_trained_before_the_first_call():
    model = chain()
    model[1].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    before = trained(model)
    adapt(model, ["0"], trainable=["1"])
    adapt(model, ["4"], "ohora", trainable=["2"])
    qk.unload(model, merge=False)
    assert trained(model) == before
    adapt(model, ["0"])
    qk.unload(model, merge=True)
    assert trained(model) == before


@pytest.mark.parametrize(
    "form", [iter, tuple, set, dict.fromkeys, lambda names: (n for n in names)]
)
def test_names_of_any_iterable_are_read_once(form):
    """As a generator they were used up by the first check, and the head stayed frozen."""
    model = adapt(chain(), form(["0", "1"]), trainable=form(["2", "3"]), skip=form(["1"]))
    assert trained(model) == {"0.lam", "2.weight", "2.bias", "3.weight", "3.bias"}


@pytest.mark.parametrize(("argument", "wrong"), [("trainable", [3]), ("skip", [None])])
def test_names_that_are_none_are_refused(argument, wrong):
    with pytest.raises(TypeError, match=f"{argument} must hold strings, got"):
        adapt(chain(), ["0"], **{argument: wrong})


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


@pytest.mark.parametrize("name", ["head", "embed", "head.weight", "embed.weight"])
def test_a_tied_weight_trains_by_either_name(name, tmp_path):
    model = adapt(Tied(), ["body"], trainable=[name])
    assert trained(model) == {"embed.weight", "body.lam"}
    model(torch.arange(3)).sum().backward()
    assert model.head.weight.grad is not None
    with torch.no_grad():
        model.embed.weight.normal_()
    qk.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    base = Tied()
    with torch.no_grad():
        base.body.weight.copy_(model.body.weight)
        base.body.bias.copy_(model.body.bias)
    other = qk.load_adapter(base, tmp_path)
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, model.head.weight)


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_inference_mode_is_named_at_once(adapter):
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        adapt(chain(), ["0"], adapter)
    with torch.inference_mode():
        model = chain()
    with pytest.raises(ValueError, match="inference_mode"):
        adapt(model, ["0"], adapter)
    with torch.no_grad():
        model = adapt(chain(), ["0"], adapter)
    model(torch.randn(2, 16)).sum().backward()
