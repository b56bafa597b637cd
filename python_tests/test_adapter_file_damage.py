"""A damaged adapter file is refused by name, wherever it was hit."""

from __future__ import annotations

import json

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import ADAPTERS, base, metadata, moved, refusal, x
from torch import nn

import qrlora_kernels as qk


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_one_flipped_bit_anywhere_is_refused_or_without_effect(adapter, path):
    """78 of 94 such files loaded, with outputs off by up to 1e36.

    Harmless are a few places in the header: the notes of versions, which nothing reads.
    """
    model = moved(adapter, head=True)
    qk.save_adapter(model, path)
    whole, want = path.read_bytes(), model(x())
    data = 8 + int.from_bytes(whole[:8], "little")
    for at in [*range(0, data, 37), *range(data, len(whole), max(1, (len(whole) - data) // 40))]:
        for bit in (0x40, 0x01):
            damaged = bytearray(whole)
            damaged[at] ^= bit
            path.write_bytes(damaged)
            fresh = base()
            said = refusal(lambda model=fresh: qk.load_adapter(model, path))
            if said:
                assert str(path) in said, at
                assert type(fresh[0]) is nn.Linear
            else:
                assert at < data
                assert helpers.same_bits(fresh(x()), want), at


ENTRIES = [
    *(("weight", v) for v in (None, {}, [], 3, {"shape": [32, 16]}, {"shape": "x", "dtype": 1})),
    *(("options", v) for v in (3, None, [], {"rank": [1]}, {"new": 1}, {"rank": "4"})),
    *(("digests", v) for v in ("x", None, 3, ["q"])),
    *(("adapter", v) for v in ("none", None, 3, ["qr"])),
]
WHOLE = [
    *(("layers", v) for v in (None, [], 3, {"0": None}, {"0": []}, {"0": "qr"})),
    *(("extra", v) for v in (None, 3, ["3.weight", "gone"], [[]])),
    *(("thawed", v) for v in (3, ["gone"])),
    *(("tied", v) for v in (3, [], {"2.weight": "gone"})),
    *(("frozen", v) for v in (3, [], "x")),
    *(("shapes", v) for v in (None, {}, [], {"0.lam": 3}, {"0.lam": ["a"]})),
]


def damaged(path, change):
    """The file again with another manifest, as files of earlier releases are: without a digest."""
    notes, tensors = metadata(path), load_file(path)
    del notes["digest"]
    save_file(tensors, path, notes | {"manifest": change(json.loads(notes["manifest"]))})
    fresh = base()
    with pytest.raises(ValueError, match=str(path)):
        qk.load_adapter(fresh, path)
    assert type(fresh[0]) is nn.Linear


@pytest.mark.parametrize(("key", "value"), ENTRIES)
def test_a_damaged_entry_of_a_layer_names_the_file(key, value, path):
    """It ended in KeyError, TypeError or AttributeError from within."""
    qk.save_adapter(moved("qr", head=True), path)

    def change(manifest):
        manifest["layers"]["0"][key] = value
        return json.dumps(manifest)

    damaged(path, change)


@pytest.mark.parametrize(("key", "value"), WHOLE)
def test_a_damaged_manifest_names_the_file(key, value, path):
    qk.save_adapter(moved("qr", head=True), path)
    damaged(path, lambda manifest: json.dumps(manifest | {key: value}))


@pytest.mark.parametrize("missing", ["layers", "extra", "shapes"])
def test_a_missing_part_names_the_file(missing, path):
    qk.save_adapter(moved("qr"), path)
    damaged(path, lambda m: json.dumps({k: v for k, v in m.items() if k != missing}))


@pytest.mark.parametrize("text", ["", "null", "3", "[" * 100_000, '{"layers": {', "\U0001f600"])
def test_text_that_is_no_manifest_names_the_file(text, path):
    """Deep brackets ended in RecursionError."""
    qk.save_adapter(moved("qr"), path)
    damaged(path, lambda _: text)


def test_a_part_of_two_files_is_refused(path, tmp_path):
    """Every tensor is whole, but not the one that the manifest was written with."""
    other = tmp_path / "b.safetensors"
    qk.save_adapter(moved("qr"), path)
    changed = moved("qr")
    with torch.no_grad():
        changed[0].lam.add_(1)
    qk.save_adapter(changed, other)
    mixed = load_file(path) | {"0.lam": load_file(other)["0.lam"]}
    save_file(mixed, path, metadata(path))
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        qk.load_adapter(base(), path)
