"""Write what was trained to one file, in the form that loads again."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ..files import save_tensors
from ..fingerprint import fingerprint
from ..nn import AdapterLinear
from ..nn.base_weight import present, whole
from .adapt import require_adapted, trained
from .manifest import Manifest, describe_weight, file_at, metadata_of, sampled
from .names import buffers, parameters, unwrapped
from .tensors import value_of

Factors = Literal["auto", "stored", "rebuild"]


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    factors: Factors = "auto",
    progress: bool = False,
) -> None:
    """Write everything that was trained to one safetensors file.

    That is the trained numbers of every adapted layer, every other parameter that requires grad (a
    task head) and buffers (running statistics, counts). The file is written under a temporary name
    and renamed, so a failure leaves an earlier file as it was. A layer whose base weight was
    changed since its adapter began is written with that weight.

    Parameters
    ----------
    model : nn.Module
        With adapted layers, merged or not, wrapped or not. Of a model sharded by ``fully_shard``
        every rank calls it, and rank 0 writes.
    path : str or path
        Its folder is made if it does not exist; in a folder, the file is ``adapter.safetensors``.
    factors : "auto", "stored" or "rebuild"
        Whether the frozen factors are in the file or are recomputed from the base on loading. QR
        factors follow from W and their pivots, so "auto" stores the pivots alone where they give
        the layer's factors back bit for bit, as they do unless the model was cast or changed since;
        all other factors are stored.
    progress : bool
        Show a bar over the layers.

    Raises
    ------
    ValueError
        If the model has no adapted layer or is in an FSDP1 wrapper, ``factors`` is none of the
        three, or it is "rebuild" for factors that do not follow from the base.
    """
    if factors not in get_args(Factors):
        raise ValueError(f"factors must be one of {list(get_args(Factors))}, got {factors!r}")
    _refuse_flattened(model)
    root, layers = unwrapped(model), require_adapted(model)
    own = {id(p) for layer in layers.values() for p in trained(layer)}
    thawed = _named_once({n: p for n, p in parameters(root).items() if p.requires_grad}, own)
    extra = {n: value_of(root, n) for n in thawed | _named_once(buffers(root), own)}
    tensors: dict[str, Tensor] = {}
    manifest: Manifest = {"layers": {}}
    changed = []
    for name, layer in tqdm(layers.items(), "save", disable=not progress):
        with present(layer):
            weight = whole(layer.base_weight)
            stored = _stores(name, layer, weight, factors)
            kept = (*layer.trainables, *(layer.factors if stored else layer.compact))
            tensors |= {f"{name}.{key}": getattr(layer, key) for key in kept}
            manifest["layers"][name] = _describe(layer, weight, stored)
            if layer.base_changed():
                changed.append(name)
                extra[f"{name}.weight"] = weight
    _tell_changed(changed)
    _tell_not_finite(tensors)
    tensors = {key: _for_file(tensor) for key, tensor in (tensors | extra).items()}
    narrow = {f"{n}.{key}" for n, layer in layers.items() for key in layer.compact}
    tensors |= {key: _narrowed(tensors[key]) for key in narrow & tensors.keys()}
    adapted = {f"{name}.weight" for name in layers}
    manifest |= {
        "extra": sorted(extra),
        "thawed": sorted(thawed),
        "shapes": {key: list(tensor.shape) for key, tensor in tensors.items()},
        "frozen": _frozen(root, own, {*extra, *adapted}),
    }
    _write(model, file_at(Path(path)), tensors, metadata_of(manifest, tensors))


def _named_once(named: dict[str, Any], without: set[int]) -> dict[str, Tensor]:
    """Each tensor under the first of its names."""
    once = {id(tensor): name for name, tensor in reversed(named.items())}
    return {name: named[name] for tensor, name in reversed(once.items()) if tensor not in without}


def _frozen(root: nn.Module, own: set[int], known: set[str]) -> dict[str, str]:
    """Sampled digests of what was not trained and is in no adapted weight."""
    rest = {n: p for n, p in parameters(root).items() if n not in known and id(p) not in own}
    return {n: sampled(whole(p)) for n, p in _named_once(rest, set()).items() if not p.is_meta}


def _stores(name: str, layer: AdapterLinear, weight: Tensor, factors: Factors) -> bool:
    """Whether the factors go into the file themselves."""
    if factors == "stored" or (factors == "auto" and not layer.compact):
        return True
    if not layer.rebuildable():
        raise ValueError(
            f"factors must be 'auto' or 'stored' for {name}, whose basis does not follow from "
            f"its weight, got {factors!r}"
        )
    if not layer.compact:
        return False  # the file has digests of what loading recomputes
    if _rebuilds(layer, weight):
        return False
    if factors == "rebuild":
        raise ValueError(
            f"factors must be 'auto' or 'stored' for {name}, whose factors no longer follow from "
            f"its weight (it was cast or changed after adapt), got {factors!r}"
        )
    return True


def _rebuilds(layer: AdapterLinear, weight: Tensor) -> bool:
    """Whether loading would compute the very bits of the layer's factors."""
    matrix = weight.t() if layer.conv1d else weight
    try:
        made = layer.rebuild(
            matrix, layer.options, {key: getattr(layer, key) for key in layer.compact}
        )
    except ValueError:
        return False
    return all(
        made[key].dtype == getattr(layer, key).dtype and torch.equal(made[key], getattr(layer, key))
        for key in layer.factors
    )


def _describe(layer: AdapterLinear, weight: Tensor, stored: bool) -> Manifest:
    return {
        "adapter": layer.kind,
        "options": layer.options.to_dict(),
        "rank": layer.rank,
        "stored_factors": stored,
        "weight": describe_weight(layer, weight),
        # Factors without compact numbers must come back bit for bit.
        "digests": {}
        if layer.compact
        else {n: fingerprint(getattr(layer, n)) for n in layer.factors},
    }


def _for_file(tensor: Tensor) -> Tensor:
    """A contiguous CPU copy of a whole tensor."""
    return whole(tensor).detach().cpu().contiguous().clone()


def _narrowed(tensor: Tensor) -> Tensor:
    """Column indices take half the room as int32."""
    return tensor.to(torch.int32) if tensor.dtype == torch.int64 else tensor


def _write(model: nn.Module, path: Path, tensors: dict[str, Tensor], metadata: Any) -> None:
    sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
    if not sharded or dist.get_rank() == 0:
        save_tensors(path, tensors, metadata)
    if sharded:
        dist.barrier()  # the file is there when the call returns, on every rank


def _refuse_flattened(model: nn.Module) -> None:
    for module in model.modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                "model must not be sharded by FullyShardedDataParallel, which flattens what "
                "trained: call save_adapter(model.module, path) inside "
                "FullyShardedDataParallel.summon_full_params(model), or use fully_shard"
            )


def _tell_changed(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"the base weights of {', '.join(names)} were changed after their adapters began; the "
            "file holds these weights too, so that it loads over either base. If a checkpoint was "
            "loaded after adapt, call qk.refresh(model) before training",
            stacklevel=3,
        )


def _tell_not_finite(tensors: dict[str, Tensor]) -> None:
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        warnings.warn(
            f"saved with NaN or infinite numbers, and not to be loaded: {', '.join(bad)}",
            stacklevel=3,
        )
