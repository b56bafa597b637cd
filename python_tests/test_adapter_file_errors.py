"""Adapter files that cannot be loaded: a clear error, and the model as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapter_file import ADAPTERS, Net, trained
from torch import nn

import qrlora_kernels as qk
from qrlora_kernels import files


def snapshot(model):
    """Everything that an error must leave alone."""
    return (
        [(n, id(m)) for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()],
    )


def refuses(model, path, message, error=ValueError):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        qk.load_adapter(model, path)
    assert snapshot(model) == before


def rewrite(path, change):
    """The file again with ``change(tensors, metadata)`` applied, as if it had been written so.

    Files of earlier releases have no digest over everything.
    """
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    del metadata["digest"]
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.fixture(params=ADAPTERS)
def saved(request, tmp_path):
    path = tmp_path / "a.safetensors"
    qk.save_adapter(trained(request.param), path)
    return path


def test_another_base_is_refused(saved):
    other = Net()
    with torch.no_grad():
        other.second.weight.normal_()
    refuses(other, saved, r"second\.weight is not the weight .* fingerprint must be")


def test_one_changed_bit_is_refused(saved):
    other = Net()
    other.second.weight.data.view(torch.int32)[5, 5] ^= 1
    refuses(other, saved, r"second\.weight is not the weight .* fingerprint must be")


def test_another_dtype_is_refused(saved):
    refuses(Net().bfloat16(), saved, "dtype must be float32, got bfloat16")


def test_another_shape_is_refused(saved):
    refuses(Net(width=16), saved, r"shape must be \[32, 32\], got \[16, 16\]")


def test_a_missing_layer_is_refused(saved):
    other = Net()
    del other.second
    refuses(other, saved, "model has no layer second")


def test_a_missing_or_other_head_is_refused(saved):
    other = Net()
    other.head = nn.Linear(48, 2)
    refuses(other, saved, r"head\.bias of shape \[3\] .* got \[2\]")
    del other.head
    refuses(other, saved, r"head\.bias .* got no such parameter")


def test_an_adapted_layer_that_the_file_does_not_know_is_refused(saved):
    other = qk.adapt(Net(), "head", rank=2, progress=False)
    refuses(other, saved, "adapted layers that .* does not know: head")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_cut_off_file_is_refused(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    refuses(Net(), saved, "is not a complete safetensors file")


def test_a_foreign_file_is_refused(saved):
    save_file({"weight": torch.ones(3)}, saved)
    refuses(Net(), saved, "must be a file written by save_adapter")
    saved.write_bytes(b"PK\x03\x04 something else entirely")
    refuses(Net(), saved, "is not a complete safetensors file")


def test_a_newer_format_is_refused(saved):
    rewrite(saved, lambda tensors, metadata: metadata.update(format_version="2"))
    refuses(Net(), saved, "has format version '2'.* reads up to 1: install a newer release")


def test_a_missing_tensor_is_refused(saved):
    rewrite(saved, lambda tensors, metadata: tensors.pop("head.bias"))
    refuses(Net(), saved, r"lacks the tensors head\.bias")


def test_a_tensor_of_another_shape_is_refused(saved):
    def shorten(tensors, metadata):
        name = next(n for n in tensors if n.startswith("second."))
        tensors[name] = tensors[name][:-1].clone()

    rewrite(saved, shorten)
    refuses(Net(), saved, "second")


@pytest.mark.parametrize("manifest", [None, "no json", "[]", '{"layers": {}}', '{"extra": []}'])
def test_a_damaged_manifest_is_refused(saved, manifest):
    def damage(tensors, metadata):
        metadata.pop("manifest")
        if manifest is not None:
            metadata["manifest"] = manifest

    rewrite(saved, damage)
    refuses(Net(), saved, "manifest")


def test_changed_pivots_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    qk.save_adapter(trained("qr"), path)

    def swap(tensors, metadata):
        tensors["first.pivots"] = tensors["first.pivots"].flip(0).contiguous()

    rewrite(path, swap)
    refuses(Net(), path, "the factors of first cannot be rebuilt")


def test_rebuilt_factors_that_differ_are_refused(tmp_path, monkeypatch):
    """Another machine's SVD may give other signs: that must not pass for the trained model."""
    path = tmp_path / "a.safetensors"
    qk.save_adapter(trained("lora_xs"), path, factors="rebuild")
    original = qk.linalg.truncated_svd

    def other_signs(*args, **options):
        return [type(t)(-t.u, t.s, -t.vh) for t in original(*args, **options)]

    monkeypatch.setattr("qrlora_kernels.adapters.lora_xs.linalg.truncated_svd", other_signs)
    refuses(Net(), path, "recomputed here, differs .* factors='stored'")


def test_no_file_and_no_adapter(tmp_path):
    refuses(Net(), tmp_path / "nothing", "no adapter file at", FileNotFoundError)
    with pytest.raises(ValueError, match="must hold adapted layers"):
        qk.save_adapter(Net(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="factors must be one of"):
        qk.save_adapter(trained(), tmp_path / "a.safetensors", factors="none")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    model = trained()
    qk.save_adapter(model, path)
    before = path.read_bytes()

    def dies(tensors, filename, metadata):
        Path(filename).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        qk.save_adapter(copy.deepcopy(model), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
