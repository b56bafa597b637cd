"""What an adapter file says of itself: its format, its layers, and the base it belongs to.

Per adapted layer the file holds the trained tensors and either the frozen factors or the few
numbers they are rebuilt from; its metadata hold a manifest with each layer's options and the
fingerprint of its base weight, and one digest over everything: another base or a damaged byte is an
error and never a silently different model.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..adapters.options import Options
from ..files import as_path
from ..fingerprint import digest_of
from ..nn import AdapterLinear, base_weight, quantised
from ..version import __version__
from .adapt import adapter_type
from .names import canonical

FORMAT = "qrlora_kernels adapter"
FORMAT_VERSION = 1
FILE_NAME = "adapter.safetensors"  # in a folder that is given in place of a file
SAMPLES = 64  # elements of a frozen tensor that tell it from another's

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A layer in the file."""

    kind: type[AdapterLinear]
    options: Options
    stored_factors: bool
    weight: Manifest  # shape [N, K], dtype, conv1d, fingerprint
    digests: dict[str, str]

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of this layer that are in the file."""
        adapter = self.kind.adapter
        held = adapter.held_factors(self.options)
        return (*adapter.trainables, *(held if self.stored_factors else adapter.rebuilt_from))

    def to_manifest(self, rank: int) -> Manifest:
        """What :func:`_entry` reads; the rank is for people."""
        return {
            "adapter": self.kind.kind,
            "options": self.options.to_dict(),
            "rank": rank,
            "stored_factors": self.stored_factors,
            "weight": self.weight,
            "digests": self.digests,
        }


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds, checked to be whole, or what one of a model would hold.

    Attributes
    ----------
    path : Path or str
        What errors call it.
    layers : dict of Entry
    extra : dict of Tensor
        What was trained beside the adapters, and statistics that training moves.
    thawed : set of str
        Those of ``extra`` that trained.
    tied : dict of str
        Those of ``extra`` that are another one's tensor under a further name, and that one's name.
    frozen : dict of str or None
        Sampled digests of everything else; None in files that have none.
    tensors : dict of Tensor
        Of the layers, under ``layer.tensor``.
    """

    path: Path
    layers: dict[str, Entry]
    extra: dict[str, Tensor]
    thawed: frozenset[str]
    tied: dict[str, str]
    frozen: dict[str, str] | None
    tensors: dict[str, Tensor]

    def tensors_of(self, name: str) -> dict[str, Tensor]:
        """Those of the layer ``name``."""
        return {key: self.tensors[f"{name}.{key}"] for key in self.layers[name].keys}


def file_at(path: str | os.PathLike[str]) -> Path:
    """``path``, or the adapter's file in it if it is a folder."""
    target = as_path("path", path)
    return target / FILE_NAME if target.is_dir() else target


def packed(file: AdapterFile) -> tuple[dict[str, Tensor], Manifest]:
    """The tensors and the manifest from which :func:`read` makes ``file``."""
    first = {name: tensor for name, tensor in file.extra.items() if name not in file.tied}
    tensors = {name: for_file(tensor) for name, tensor in (first | file.tensors).items()}
    ranks = {n: entry.kind.adapter.rank(file.tensors_of(n)) for n, entry in file.layers.items()}
    manifest: Manifest = {
        "layers": {name: entry.to_manifest(ranks[name]) for name, entry in file.layers.items()},
        "extra": sorted(first),
        "thawed": sorted(file.thawed & first.keys()),
        "tied": file.tied,
        "complex": sorted(name for name, tensor in first.items() if tensor.is_complex()),
        "frozen": file.frozen,
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    return tensors, manifest


def metadata_of(manifest: Manifest, tensors: dict[str, Tensor]) -> dict[str, str]:
    text = json.dumps(manifest)
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "qrlora_kernels": __version__,
        "torch": torch.__version__,
        "manifest": text,
        "digest": digest_of(tensors, text),
    }


def describe_weight(layer: nn.Module, weight: Tensor, digest: str) -> Manifest:
    """The base weight of ``layer``; ``weight`` as the layer stores it, and its fingerprint."""
    shape = quantised.shape_of(weight)
    return {
        "shape": list(reversed(shape) if base_weight.is_conv1d(layer) else shape),
        "dtype": quantised.kind_of(weight),
        "conv1d": base_weight.is_conv1d(layer),
        "fingerprint": digest,
    }


def for_file(tensor: Tensor) -> Tensor:
    """A contiguous CPU copy; of complex numbers, pairs [..., 2] of real ones."""
    tensor = tensor.detach().cpu()
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.contiguous().clone()


def all_finite(tensor: Tensor) -> bool:
    floating = tensor.is_floating_point() or tensor.is_complex()
    return not floating or bool(tensor.isfinite().all())


def sampled(tensor: Tensor) -> str:
    """A digest of dtype, shape and some elements (of a quantised weight, codes) at fixed places."""
    tensor = quantised.held(tensor)
    flat = tensor.detach().reshape(-1)
    at = torch.linspace(0, max(flat.numel() - 1, 0), SAMPLES, dtype=torch.float64).long().unique()
    some = flat[at.to(flat.device)] if flat.numel() else flat
    return digest_of({"": some}, str(list(tensor.shape)))[:8]  # a file has one a tensor


def format_of(path: str | os.PathLike[str]) -> str | None:
    """What a safetensors file says that it is; None if it is no such file, or does not say."""
    try:
        with safe_open(file_at(path), framework="pt") as file:
            return (file.metadata() or {}).get("format")
    except SafetensorError:
        return None


def check_version(path: object, metadata: dict[str, str], newest: int) -> None:
    """Raise if the file at ``path`` is of a newer format than ``newest``."""
    version = metadata.get("format_version", "")
    if not version.isdigit() or int(version) > newest:
        raise ValueError(
            f"{path} has format version {version!r}, and qrlora_kernels {__version__} reads up to "
            f"{newest}: install a newer release"
        )


def read(path: str | os.PathLike[str]) -> AdapterFile:
    """Read a file and check that it is whole.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is no complete adapter file, damaged, or of a newer format; the message names it.
    """
    path = file_at(path)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    metadata, tensors = _open(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} must be a file written by save_adapter, got another safetensors")
    check_version(path, metadata, FORMAT_VERSION)
    text = metadata.get("manifest", "")
    if metadata.get("digest") not in (None, digest_of(tensors, text)):
        raise ValueError(f"{path} is damaged: its content is not what its digest was made of")
    try:
        manifest = json.loads(text)
        layers = {name: _entry(entry) for name, entry in manifest["layers"].items()}
        others = _others(manifest)
        shapes = {str(key): [int(n) for n in s] for key, s in manifest["shapes"].items()}
    except _DAMAGE as error:
        raise ValueError(f"{path} has a damaged manifest: {error!r}") from None
    in_layers = [f"{name}.{key}" for name, entry in layers.items() for key in entry.keys]
    _check_tensors(path, [*others.extra, *in_layers], shapes, tensors)
    values = {n: _value(tensors[n], n in others.pairs) for n in others.extra}
    values |= {n: values[first] for n, first in others.tied.items()}
    return AdapterFile(
        path,
        {canonical(name): entry for name, entry in layers.items()},
        {canonical(name): value for name, value in values.items()},
        frozenset(canonical(n) for n in values if others.tied.get(n, n) in others.thawed),
        others.tied,
        others.frozen,
        {canonical(name): tensors[name] for name in in_layers},
    )


_DAMAGE = (KeyError, TypeError, AttributeError, ValueError, RecursionError, json.JSONDecodeError)


def _open(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None


def _entry(entry: Manifest) -> Entry:
    kind = adapter_type(entry["adapter"])
    weight = entry["weight"]
    (n, k), digests = weight["shape"], entry["digests"]
    checked = {
        "shape": [int(n), int(k)],
        "dtype": str(weight["dtype"]),
        "conv1d": bool(weight["conv1d"]),
        "fingerprint": str(weight["fingerprint"]),
    }
    return Entry(
        kind,
        kind.adapter.options_type(**entry["options"]),
        bool(entry["stored_factors"]),
        checked,
        {str(name): str(digest) for name, digest in digests.items()},
    )


class _Others(NamedTuple):
    """What the manifest says of tensors outside the adapters."""

    extra: list[str]
    thawed: set[str]
    tied: dict[str, str]  # a further name -> the name in ``extra``
    pairs: set[str]  # complex numbers, which are stored as pairs of real ones
    frozen: dict[str, str] | None


def _others(manifest: Manifest) -> _Others:
    """Of earlier releases too, whose files know nothing but ``extra``."""
    extra = [str(name) for name in manifest["extra"]]
    frozen = manifest.get("frozen")
    tied = {str(name): str(first) for name, first in manifest.get("tied", {}).items()}
    lost = sorted({*manifest.get("thawed", extra), *tied.values()} - set(extra))
    if lost:
        raise ValueError(f"extra lacks {', '.join(lost)}")
    return _Others(
        extra,
        set(manifest.get("thawed", extra)),
        tied,
        set(manifest.get("complex", ())),
        None if frozen is None else {str(n): str(digest) for n, digest in frozen.items()},
    )


def _value(tensor: Tensor, is_pair: bool) -> Tensor:
    return torch.view_as_complex(tensor) if is_pair else tensor


def _check_tensors(
    path: Path, wanted: list[str], shapes: dict[str, list[int]], tensors: dict[str, Tensor]
) -> None:
    missing = [key for key in wanted if key not in tensors or key not in shapes]
    if missing:
        raise ValueError(f"{path} lacks the tensors {', '.join(missing)}")
    for key in wanted:
        if list(tensors[key].shape) != shapes[key]:
            raise ValueError(
                f"{path} must hold {key} with shape {shapes[key]}, got {list(tensors[key].shape)}"
            )
