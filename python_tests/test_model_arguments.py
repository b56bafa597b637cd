"""A model that is none, and a path that is none: an error that names the argument."""

from __future__ import annotations

import re

import pytest
from torch import nn

import qrlora_kernels as qk

CALLS = {
    "adapt": lambda model: qk.adapt(model, ["0"], progress=False),
    "adapted_layers": qk.adapted_layers,
    "count_parameters": qk.count_parameters,
    "disabled": lambda model: qk.disabled(model).__enter__(),
    "load_adapter": lambda model: qk.load_adapter(model, "adapter.safetensors"),
    "merge": qk.merge,
    "refresh": qk.refresh,
    "save_adapter": lambda model: qk.save_adapter(model, "adapter.safetensors"),
    "scale": lambda model: qk.scale(model, 0.5),
    "summary": qk.summary,
    "tune": qk.tune,
    "unload": qk.unload,
    "unmerge": qk.unmerge,
}


@pytest.mark.parametrize("model", [None, {}, [nn.Linear(4, 4)], nn.Linear])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_no_module_is_refused_by_name(call, model):
    with pytest.raises(TypeError, match=f"model must be an nn.Module, got {type(model).__name__}"):
        call(model)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (None, TypeError, "path must be a string or a path, got NoneType None"),
        (3, TypeError, "path must be a string or a path, got int 3"),
        (b"file", TypeError, "path must be a string or a path, got bytes b'file'"),
        ("", ValueError, "path must name a file or a folder, got ''"),
    ],
)
@pytest.mark.parametrize("call", [qk.save_adapter, qk.load_adapter])
def test_what_is_no_path_is_refused_by_name(call, path, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = qk.adapt(nn.Sequential(nn.Linear(16, 16)), ["0"], rank=4, progress=False)
    qk.save_adapter(model, tmp_path / "other.safetensors")
    with pytest.raises(error, match=re.escape(message)):
        call(model, path)
    assert [file.name for file in tmp_path.iterdir()] == ["other.safetensors"]
