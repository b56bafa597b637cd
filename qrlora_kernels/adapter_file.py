"""One safetensors file per adapter: what was trained, and what identifies the base it belongs to.

Per adapted layer the file holds the trained tensors and either the frozen factors or the few
numbers they are rebuilt from; its metadata hold a manifest with each layer's options and the
fingerprint of its base weight: another base is an error and never a silently different model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from .files import save_tensors
from .fingerprint import fingerprint
from .model import adapted_layers, adapter_type, install, require_adapted, trained
from .nn import AdapterLinear
from .nn.base import Options, State
from .nn.frozen import check_base, frozen_matrix, is_conv1d
from .version import __version__

FORMAT = "qrlora_kernels adapter"
FORMAT_VERSION = 1

Factors = Literal["auto", "stored", "rebuild"]
Manifest = dict[str, Any]


def save_adapter(model: nn.Module, path: str | os.PathLike[str], factors: Factors = "auto") -> None:
    """Write everything that was trained to one safetensors file.

    That is the trained numbers of every adapted layer, every other parameter that requires grad (a
    task head) and floating-point buffers (running statistics). The file is written under a
    temporary name and renamed, so a failure leaves an earlier file as it was.

    Parameters
    ----------
    model : nn.Module
        With adapted layers, merged or not.
    path : str or path
        Its folder is made if it does not exist.
    factors : "auto", "stored" or "rebuild"
        Whether the frozen factors are in the file or are recomputed from the base on loading. QR
        factors follow from W and their pivots, so "auto" stores the pivots alone; other factors
        depend on the machine's SVD and are stored.

    Raises
    ------
    ValueError
        If the model has no adapted layer, ``factors`` is none of the three, or it is "rebuild" for
        factors that do not follow from the base, as those of a gradient.
    """
    if factors not in get_args(Factors):
        raise ValueError(f"factors must be one of {list(get_args(Factors))}, got {factors!r}")
    layers = require_adapted(model)
    own = {id(p) for layer in layers.values() for p in trained(layer)}
    extra: dict[str, Tensor] = {
        n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in own
    }
    extra |= _statistics(model, layers)
    tensors = dict(extra)
    manifest: Manifest = {"layers": {}, "extra": sorted(extra)}
    for name, layer in layers.items():
        store = factors == "stored" or (factors == "auto" and not layer.compact)
        if not store and not layer.rebuildable():
            raise ValueError(
                f"factors must be 'auto' or 'stored' for {name}, whose basis does not follow from "
                f"its weight, got {factors!r}"
            )
        saved = (*layer.trainables, *(layer.factors if store else layer.compact))
        tensors |= {f"{name}.{key}": getattr(layer, key) for key in saved}
        manifest["layers"][name] = _describe(layer, store)
    tensors = {key: _for_file(tensor) for key, tensor in tensors.items()}
    manifest["shapes"] = {key: list(tensor.shape) for key, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "qrlora_kernels": __version__,
        "torch": torch.__version__,
        "manifest": json.dumps(manifest),
    }
    save_tensors(Path(path), tensors, metadata)


def _statistics(model: nn.Module, layers: dict[str, AdapterLinear]) -> dict[str, Tensor]:
    """Buffers that training moves without a gradient, such as a batch norm's running mean."""
    kept = model.state_dict(keep_vars=True)
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in kept and buffer.is_floating_point() and name.rpartition(".")[0] not in layers
    }


def _describe(layer: AdapterLinear, stored: bool) -> Manifest:
    base = layer.to_linear(merge=False)
    return {
        "adapter": layer.kind,
        "options": layer.options.to_dict(),
        "rank": layer.rank,
        "stored_factors": stored,
        "weight": _describe_weight(base),
        # Factors without compact numbers must come back bit for bit; see _state.
        "digests": {}
        if layer.compact
        else {n: fingerprint(getattr(layer, n)) for n in layer.factors},
    }


def _describe_weight(linear: nn.Module) -> Manifest:
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return {
        "shape": list(frozen_matrix(linear).shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "conv1d": is_conv1d(linear),
        "fingerprint": fingerprint(weight),
    }


def _for_file(tensor: Tensor) -> Tensor:
    """A contiguous CPU copy; column indices take half the room as int32."""
    tensor = tensor.detach().cpu()
    return (tensor.to(torch.int32) if tensor.dtype == torch.int64 else tensor).contiguous().clone()


def _from_file(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int64) if tensor.dtype == torch.int32 else tensor


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], progress: bool = False
) -> nn.Module:
    """Adapt ``model`` with what :func:`save_adapter` wrote, in place.

    Everything is read and checked before the first layer is swapped: after an error the model is as
    it was. Layers that are adapted already are replaced over their own base. All else is frozen,
    save the parameters that were trained beside the adapter.

    Parameters
    ----------
    model : nn.Module
        The base model the adapter was trained over.
    path : str or path
    progress : bool
        Show a bar over the layers.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no complete adapter file or of a newer format, or the model is not the base:
        a layer is missing or its weight has another shape, dtype or content.
    """
    path = Path(path)
    manifest, tensors = _read(path)
    stray = sorted(set(adapted_layers(model)) - set(manifest["layers"]))
    if stray:
        raise ValueError(f"model has adapted layers that {path} does not know: {', '.join(stray)}")
    others = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in manifest["extra"]:
        have = list(others[name].shape) if name in others else "no such parameter"
        if have != list(tensors[name].shape):
            raise ValueError(
                f"model must have a parameter {name} of shape {list(tensors[name].shape)} for "
                f"{path}, got {have}"
            )
    prepared = [
        (name, *_prepare(model, name, entry, tensors))
        for name, entry in tqdm(manifest["layers"].items(), "load", disable=not progress)
    ]
    layers = {
        name: adapter_type(manifest["layers"][name]["adapter"]).from_state(base, options, state)
        for name, base, options, state in prepared
    }
    install(model, layers)
    for name in manifest["extra"]:
        if isinstance(others[name], nn.Parameter):
            others[name].requires_grad_(True)
        with torch.no_grad():
            others[name].copy_(tensors[name])
    return model


def _read(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} must be a file written by save_adapter, got another safetensors")
    version = metadata.get("format_version", "")
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r}, and qrlora_kernels {__version__} reads up to "
            f"{FORMAT_VERSION}: install a newer release"
        )
    try:
        manifest = json.loads(metadata["manifest"])
        shapes = {key: manifest["shapes"][key] for key in _expected(manifest)}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} has a damaged manifest: {error!r}") from None
    missing = [key for key in shapes if key not in tensors]
    if missing:
        raise ValueError(f"{path} lacks the tensors {', '.join(missing)}")
    for key, shape in shapes.items():
        if list(tensors[key].shape) != shape:
            raise ValueError(
                f"{path} must hold {key} with shape {shape}, got {list(tensors[key].shape)}"
            )
    return manifest, tensors


def _expected(manifest: Manifest) -> list[str]:
    keys = list(manifest["extra"])
    for name, entry in manifest["layers"].items():
        kind = adapter_type(entry["adapter"])
        saved = kind.factors if entry["stored_factors"] else kind.compact
        keys += [f"{name}.{key}" for key in (*kind.trainables, *saved)]
    return keys


def _prepare(
    model: nn.Module, name: str, entry: Manifest, tensors: dict[str, Tensor]
) -> tuple[nn.Module, Options, State]:
    """The base layer called ``name``, checked to be the saved one, with options and tensors."""
    try:
        base = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"model has no layer {name}, which the adapter was trained on") from None
    if isinstance(base, AdapterLinear):
        base = base.to_linear(merge=False)
    check_base(base, name)
    have, want = _describe_weight(base), entry["weight"]
    for key in ("conv1d", "shape", "dtype", "fingerprint"):
        if have[key] != want[key]:
            raise ValueError(
                f"{name}.weight is not the weight the adapter was trained over: its {key} must be "
                f"{want[key]}, got {have[key]}"
            )
    kind = adapter_type(entry["adapter"])
    options = kind.options_type(**entry["options"])
    weight = frozen_matrix(base)
    own = {
        key: _from_file(tensors[f"{name}.{key}"]).to(weight.device)
        for key in (*kind.trainables, *kind.factors)
        if f"{name}.{key}" in tensors
    }
    return base, options, own | _factors(name, kind, weight, options, entry, own)


def _factors(
    name: str,
    kind: type[AdapterLinear],
    weight: Tensor,
    options: Options,
    entry: Manifest,
    own: State,
) -> State:
    if entry["stored_factors"]:
        return {key: own[key] for key in kind.factors}
    try:
        factors = kind.rebuild(weight, options, {key: own[key] for key in kind.compact})
    except ValueError as error:
        raise ValueError(f"the factors of {name} cannot be rebuilt: {error}") from None
    for key, digest in entry["digests"].items():
        if fingerprint(factors[key]) != digest:
            raise ValueError(
                f"the factor {key} of {name}, recomputed here, differs from the one that was "
                "trained with; save the adapter with factors='stored' where it was trained"
            )
    return factors
