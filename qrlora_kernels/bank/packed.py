"""One file of many adapters that share a start: their rows, their names, and that start."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import as_path, save_tensors
from ..fingerprint import digest_of, fingerprint
from ..model.manifest import all_finite, check_version
from ..nn.per_row import ByRow
from ..version import __version__
from .layout import Layout

FORMAT = "qrlora_kernels bank"
FORMAT_VERSION = 1


def write(layout: Layout, names: list[str], rows: Tensor, path: str | os.PathLike[str]) -> None:
    """``rows`` [A, P] and their names; rows with NaN or infinite numbers are refused."""
    if not all_finite(rows):
        bad = [names[at] for at in (~rows.isfinite().all(1)).nonzero().flatten().tolist()]
        raise ValueError(f"names must be of adapters with finite numbers, got {', '.join(bad[:3])}")
    # A tensor and no metadata: there is a limit to the size of those.
    text = torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)
    tensors = {"rows": rows.cpu().contiguous(), "names": text}
    about = json.dumps(_about(layout))
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "qrlora_kernels": __version__,
        "about": about,
        "digest": digest_of(tensors, about),
    }
    save_tensors(as_path("path", path), tensors, metadata)


def read(layout: Layout, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The rows by name.

    Raises
    ------
    ValueError
        If the file is none of these, damaged, of a newer format, or of another start.
    """
    try:
        with safe_open(as_path("path", path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
    about = _checked(path, metadata, tensors)
    here = _about(layout)
    for what in ("tensors", "layers"):
        for name in sorted(about[what].keys() | here[what].keys()):
            have, want = about[what].get(name), here[what].get(name)
            if have != want:
                raise ValueError(
                    f"{path} must have the start of the bank, got another in {name}: {have} for "
                    f"{want}"
                )
    rows = tensors["rows"].to(layout.dtype)
    names = json.loads(bytes(tensors["names"].numpy()))
    if rows.shape != (len(names), layout.width) or len(set(names)) != len(names):
        raise ValueError(f"{path} must hold a row of {layout.width} numbers for every name")
    if not all_finite(rows):
        raise ValueError(f"{path} must hold finite numbers")
    return dict(zip(names, rows, strict=True))


def _checked(path: Any, metadata: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT or not {"rows", "names"} <= tensors.keys():
        raise ValueError(f"{path} must be a file of save_adapter or of AdapterBank.pack")
    check_version(path, metadata, FORMAT_VERSION)
    if metadata.get("digest") != digest_of(tensors, metadata.get("about", "")):
        raise ValueError(f"{path} is damaged: its content is not what its digest was made of")
    about: dict[str, Any] = json.loads(metadata["about"])
    return about


def _about(layout: Layout) -> dict[str, Any]:
    """What an adapter's row means here, and nowhere else."""
    return {
        "tensors": {name: list(place.shape) for name, place in layout.places.items()},
        "layers": {name: _start(layer) for name, layer in layout.layers.items()},
    }


def _start(layer: ByRow) -> dict[str, Any]:
    """The kind, the scaling, the base and the factors of one layer.

    Of factors that follow from pivots, the pivots alone: their last bits are those of a machine.
    """
    weight, factors, strength = layer.began_from()
    pivots = [key for key in layer.adapter.rebuilt_from if not factors[key].is_floating_point()]
    return {
        "adapter": layer.adapter.kind,
        "scaling": strength,
        "base": fingerprint(weight),
        "factors": {key: fingerprint(factors[key]) for key in pivots or factors},
    }
