"""Adapter files: what comes back is what was saved, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from safetensors import safe_open
from torch import nn

import qrlora_kernels as qk


class Net(nn.Module):
    def __init__(self, width=32, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(width, width, dtype=dtype)
        self.second = nn.Linear(width, 48, dtype=dtype)
        self.head = nn.Linear(48, 3, dtype=dtype)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


ADAPTERS = {
    "qr": {"tau": 0.5},
    "lora_xs": {"rank": 4, "alpha": 8, "sigma": "split"},
    "ohora": {"columns": "selected", "alpha": 2.0},
}


def trained(adapter="qr", model=None, **options):
    """A model with an adapter and a head that have moved."""
    model = Net() if model is None else model
    options = options or ADAPTERS[adapter]
    qk.adapt(model, ["first", "second"], adapter, trainable=["head"], progress=False, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def x(dtype=torch.float32):
    return torch.randn(7, 32, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("factors", ["auto", "stored", "rebuild"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_predictions_come_back_bit_for_bit(adapter, dtype, factors, tmp_path):
    model = trained(adapter, Net(dtype=dtype))
    path = tmp_path / "new folder" / "adapter.safetensors"
    qk.save_adapter(model, path, factors)
    fresh = Net(dtype=dtype).eval()
    assert qk.load_adapter(fresh, path) is fresh
    assert helpers.same_bits(fresh(x(dtype)), model(x(dtype)))
    for name, layer in qk.adapted_layers(model).items():
        other = qk.adapted_layers(fresh)[name]
        assert type(other) is type(layer)
        assert other.options == layer.options
        assert other.scaling == layer.scaling
        for key in (*layer.factors, *layer.trainables):
            assert helpers.same_bits(getattr(other, key), getattr(layer, key)), key
    wanted = [(n, p.requires_grad) for n, p in model.named_parameters()]
    assert [(n, p.requires_grad) for n, p in fresh.named_parameters()] == wanted


def test_a_new_process_gives_the_same_bits(tmp_path):
    wanted = {}
    for adapter in ADAPTERS:
        model = trained(adapter)
        qk.save_adapter(model, tmp_path / f"{adapter}.safetensors")
        wanted[adapter] = model(x()).detach()
    torch.save(wanted, tmp_path / "wanted.pt")
    code = (
        "import torch, helpers, qrlora_kernels as qk, test_adapter_file as t\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "for adapter, y in torch.load('wanted.pt').items():\n"
        "    model = qk.load_adapter(t.Net().eval(), f'{adapter}.safetensors')\n"
        "    assert helpers.same_bits(model(t.x()), y), adapter\n"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_save_while_merged(tmp_path):
    model = trained()
    want = model(x())
    qk.merge(model)
    qk.save_adapter(model, tmp_path / "a.safetensors")
    assert all(layer.merged for layer in qk.adapted_layers(model).values())
    fresh = qk.load_adapter(Net().eval(), tmp_path / "a.safetensors")
    assert helpers.same_bits(fresh(x()), want)


@pytest.mark.parametrize("merged", [False, True])
def test_load_over_an_adapted_model(merged, tmp_path):
    """Layers that are adapted already, even merged, are replaced over their own base."""
    model = trained()
    qk.save_adapter(model, tmp_path / "a.safetensors")
    other = trained("lora_xs")
    if merged:
        qk.merge(other)
    qk.load_adapter(other, tmp_path / "a.safetensors")
    assert helpers.same_bits(other(x()), model(x()))
    assert helpers.same_bits(other.first.weight, Net().first.weight)


def test_training_goes_on_after_a_reload(tmp_path):
    model = trained()
    qk.save_adapter(model, tmp_path / "a.safetensors")
    fresh = qk.load_adapter(Net(), tmp_path / "a.safetensors")
    grads = []
    for m in (model, fresh):
        m.zero_grad()
        m.train()(x()).square().sum().backward()
        grads.append([p.grad for p in m.parameters() if p.requires_grad])
    assert len(grads[0]) == 4
    assert all(map(helpers.same_bits, *grads))


def test_running_statistics_come_back(tmp_path):
    """A batch norm in the head, and one in the frozen part, moved during training as well."""

    def build():
        torch.manual_seed(0)
        head = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 3))
        return nn.ModuleDict({"first": nn.Linear(32, 32), "norm": nn.BatchNorm1d(32), "head": head})

    def run(model):
        return model["head"](model["norm"](model["first"](x())))

    model = qk.adapt(build(), "first", rank=4, trainable="head", progress=False)
    run(model.train())
    qk.save_adapter(model, tmp_path / "a.safetensors")
    fresh = qk.load_adapter(build(), tmp_path / "a.safetensors")
    assert helpers.same_bits(run(fresh.eval()), run(model.eval()))
    assert fresh["head"][0].weight.requires_grad
    assert not fresh["norm"].weight.requires_grad


def test_a_qr_adapter_of_roberta_base_size_stays_in_kilobytes(tmp_path):
    """12 layers of 768 x 768 queries and values: pivots, diagonal and λ are all there is."""
    torch.manual_seed(0)
    layers = {f"{i}_{n}": nn.Linear(768, 768) for i in range(12) for n in ("query", "value")}
    model = nn.ModuleDict(layers)
    qk.adapt(model, r".*", rank=16, progress=False)
    path = tmp_path / "a.safetensors"
    qk.save_adapter(model, path)
    assert path.stat().st_size < 40_000
    qk.save_adapter(model, path, factors="stored")
    assert path.stat().st_size > 2_000_000


def test_metadata_tell_what_is_inside(tmp_path):
    qk.save_adapter(trained(), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "qrlora_kernels adapter"
    assert metadata["qrlora_kernels"] == qk.__version__
    layer = json.loads(metadata["manifest"])["layers"]["first"]
    assert layer["adapter"] == "qr"
    assert layer["options"]["tau"] == 0.5
    assert layer["weight"]["shape"] == [32, 32]
