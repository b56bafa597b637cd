"""Checkpoints of LoRA-XS's authors (github.com/MohammadrezaBanaei/LoRA-XS) as adapters here.

They are plain LoRA folders of PEFT with one tensor more, R [r, r] of each module, which plain PEFT
drops without a word. ΔW = s · lora_B R lora_A, with Σ in lora_A: ours with a = lora_A, b = lora_B
and C = Rᵀ.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters import LoRAXSOptions
from ..adapters.options import plain_value
from ..files import as_path
from ..model.comparing import refuse_sharded
from ..model.loading import check_loadable, load
from ..model.manifest import AdapterFile, Entry, all_finite, describe_weight
from ..model.names import canonical, modules, under, unwrapped
from ..nn import AdapterLinear, LoRAXSLinear, base_weight
from ..nn.base_weight import is_linear_like, present
from .under_peft import plain_name

# An underscore joins it to the module's name; newer releases of PEFT leave the adapter's name in.
TENSOR = re.compile(
    r"(.+?)(?:\.lora_(A|B)(?:\.default)?|(?:\.default)?_lora_latent_(mapping))\.weight"
)
# What changes the meaning of the tensors, and the authors never write.
UNKNOWN = ("use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern")
SUMS = 1e-5  # rounding of the products of length N that lora_A was made by, in fp32


@dataclass
class Checkpoint:
    """What a folder holds.

    Attributes
    ----------
    folder : Path
    config : dict
        PEFT's.
    parts : dict of dict of Tensor
        "A" [r, K], "B" [N, r] and "mapping" [r, r] by module.
    heads : dict of Tensor
        Everything else.
    """

    folder: Path
    config: dict[str, Any]
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)


def from_lora_xs(
    model: nn.Module, path: str | os.PathLike[str], progress: bool = False
) -> nn.Module:
    """Adapt ``model`` with a LoRA-XS checkpoint of the authors' code, in place.

    The factors are those of the file, in the dtype of the layer's weight, never recomputed: their
    signs are the file's own. A head in it is loaded as one that trained. From there on it is an
    adapter like any other: ``save_adapter`` keeps it here, ``to_lora`` writes plain LoRA.

    Parameters
    ----------
    model : nn.Module
        The base that it was trained over, such as ``from_pretrained`` gives.
    path : str or path
        The folder with ``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``.
    progress : bool
        Show a bar over the layers.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    FileNotFoundError
        If a file is not there.
    TypeError, ValueError
        If the folder is no such checkpoint (an ordinary LoRA says so), the model lacks a layer or a
        head, or its weights are not those that the factors came from: lora_A = lora_B^T W must hold
        to the accuracy of the dtypes. The model is as it was.
    """
    check_loadable(model)
    progress = plain_value("progress", "bool", progress)
    checkpoint = _read(as_path("path", path))
    root = unwrapped(model)
    refuse_sharded(root, "load the adapter, then call fully_shard")
    return load(model, _as_file(root, checkpoint, progress), progress, strict=False)


# --- reading


def _read(folder: Path) -> Checkpoint:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA-XS checkpoint at {folder}: it has no {path.name}")
    found = Checkpoint(folder, _config(path))
    for key, tensor in _tensors(folder).items():
        name = canonical(plain_name(key))
        match = TENSOR.fullmatch(name)
        if match is None:
            found.heads[name] = tensor
        else:
            found.parts.setdefault(match[1], {})[match[2] or match[3]] = tensor
    if not any("mapping" in parts for parts in found.parts.values()):
        raise ValueError(
            f"{folder} must hold the latent mappings of LoRA-XS, got none: it is an ordinary LoRA "
            "checkpoint, which PEFT loads"
        )
    for name, parts in found.parts.items():
        _check_parts(found, name, parts)
    return found


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no config of LoRA-XS: {error!r}") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} is no config of LoRA-XS: settings by name, got {type(found).__name__}"
        )
    return found


def _config(path: Path) -> dict[str, Any]:
    config = _settings(path)
    if missing := {"r", "lora_alpha"} - config.keys():
        raise ValueError(f"{path} is no config of LoRA-XS: it has no {min(missing)}")
    rank, alpha = config["r"], config["lora_alpha"]
    plain_value(f"r in {path}", "int", rank)
    plain_value(f"lora_alpha in {path}", "float", alpha)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} must have peft_type LORA, got {config.get('peft_type')!r}")
    if unknown := [key for key in UNKNOWN if config.get(key)]:
        raise ValueError(f"{path} must not set {unknown[0]}, got {config[unknown[0]]!r}")
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
    path = folder / "adapter_model.bin"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no adapter_model.safetensors and no {path.name}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the many kinds that unpickling ends in
        raise ValueError(f"{path} holds no tensors that load: {error}") from None
    named = tensors if isinstance(tensors, dict) else {"the file": tensors}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path} must hold tensors by name, got {type(tensor).__name__} in {name}"
            )
    return {str(name): tensor for name, tensor in named.items()}


def _check_parts(found: Checkpoint, name: str, parts: dict[str, Tensor]) -> None:
    if missing := {"A", "B", "mapping"} - parts.keys():
        raise ValueError(f"{found.folder} lacks lora {', '.join(sorted(missing))} of {name}")
    rank = found.config["r"]
    shapes = {"A": [rank, "K"], "B": ["N", rank], "mapping": [rank, rank]}
    for key, tensor in parts.items():
        fits = [
            want in ("N", "K", have) for want, have in zip(shapes[key], tensor.shape, strict=False)
        ]
        if tensor.dim() != 2 or not all(fits):
            raise ValueError(
                f"{found.folder} must hold lora {key} of {name} with shape {shapes[key]}, got "
                f"{list(tensor.shape)}"
            )
        if not (tensor.is_floating_point() and all_finite(tensor)):
            raise ValueError(f"{found.folder} must hold finite numbers in lora {key} of {name}")


# --- as a file of ours


def _as_file(root: nn.Module, found: Checkpoint, progress: bool) -> AdapterFile:
    """What save_adapter would have written, after the check of the base."""
    options = LoRAXSOptions(
        rank=found.config["r"],
        alpha=found.config["lora_alpha"],
        dropout=found.config.get("lora_dropout") or 0.0,
    )
    here, random = modules(root), _is_random(found.folder)
    layers: dict[str, Entry] = {}
    tensors: dict[str, Tensor] = {}
    for name, parts in tqdm(found.parts.items(), "check", disable=not progress):
        layer = here.get(name)
        if layer is None or not is_linear_like(layer):
            raise ValueError(
                f"model must have a linear layer {name} for {found.folder}, got "
                f"{'none' if layer is None else type(layer).__name__}"
            )
        with present(layer):
            held = layer.base_weight if isinstance(layer, AdapterLinear) else layer.weight
            assert isinstance(held, Tensor)
            dtype = base_weight.dtype_of(layer, held)
            if not random:
                matrix = base_weight.matrix(layer, held)
                _check_base(name, matrix, parts["A"], parts["B"])
            described = describe_weight(layer, held, base_weight.exact_digest(layer, held))
        layers[name] = Entry(LoRAXSLinear, options, True, described, {})
        core = torch.promote_types(dtype, torch.float32)
        tensors[f"{name}.a"] = parts["A"].to(dtype)
        tensors[f"{name}.b"] = parts["B"].to(dtype)
        tensors[f"{name}.core"] = parts["mapping"].mT.contiguous().to(core)
    _check_heads(here, found)
    heads = frozenset(found.heads)
    return AdapterFile(found.folder, layers, found.heads, heads, {}, None, tensors)


def _check_heads(here: Iterable[str], found: Checkpoint) -> None:
    """Raise if a head trained and the file is without it: the model's own is at random."""
    for head in found.config.get("modules_to_save") or ():
        for name in here:
            if name.rpartition(".")[2] == head and not any(under(n, [name]) for n in found.heads):
                raise ValueError(
                    f"{found.folder} must hold {name}, which trained by its modules_to_save, got "
                    "no tensor of it"
                )


def _is_random(folder: Path) -> bool:
    """Whether the factors came from no weight, as the authors' own config says, if it is there."""
    for path in (folder / "reconstr_config.json", folder.parent / "reconstr_config.json"):
        if path.is_file():
            return bool(_settings(path).get("replacement_module_random_init"))
    return False


def _check_base(name: str, weight: Tensor, a: Tensor, b: Tensor) -> None:
    """Raise unless a = bᵀ W, which holds however good the SVD was."""
    if (len(b), a.shape[1]) != weight.shape:
        raise ValueError(
            f"{name}.weight must have shape {[len(b), a.shape[1]]}, got {list(weight.shape)}"
        )
    wanted, basis = a.to(weight.device).double(), b.to(weight.device).double()
    error, size = float((basis.mT @ weight.double() - wanted).norm()), float(wanted.norm())
    allowed = 2 * max(torch.finfo(t.dtype).eps for t in (weight, a, b)) + SUMS
    if not error <= allowed * size:
        raise ValueError(
            f"{name}.weight is not the weight that the checkpoint was trained over: lora_A must be "
            f"lora_B^T W within {allowed:.1g}, got a difference of "
            f"{error:.1g} over {size:.1g}"
        )
