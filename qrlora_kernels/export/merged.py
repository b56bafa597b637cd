"""A plain checkpoint with the updates inside the weights, written layer by layer."""

from __future__ import annotations

import copy
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters.options import plain_value
from ..files import as_path, filling, save_tensors, write_text
from ..model.adapt import adapted_layers, require_adapted
from ..model.lifecycle import named
from ..model.manifest import for_file
from ..model.names import modules, parameters, unwrapped
from ..model.saving import of_one_rank
from ..model.targets import refuse_flattened
from ..model.tensors import values_of
from ..nn import AdapterLinear, merging, quantised, switch
from ..nn.base_weight import reshard, whole
from . import under_peft
from .beside import refuse_sparse
from .folder import ADAPTER, refuse_mixed
from .source import UNSHARDED, tied_layers

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
# What an earlier checkpoint may have left, which a loader would read in place of the new one.
EARLIER = (WEIGHTS, INDEX, "model-?????-of-?????.safetensors")
SHARD_BYTES = 5_000_000_000  # as save_pretrained has in its older releases


@dataclass(frozen=True)
class Entry:
    """A tensor of the checkpoint before it is made."""

    outline: Tensor  # on the meta device
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.outline.numel() * self.outline.element_size()


def to_merged(
    model: nn.Module,
    path: str | os.PathLike[str],
    max_shard_size: int = SHARD_BYTES,
    progress: bool = False,
    dequantize: bool | torch.dtype = False,
) -> None:
    """Write the model with every update inside its weight, as a checkpoint of its own.

    ``from_pretrained`` loads the folder without this package, and whatever else reads checkpoints
    of transformers. The model stays as it is: weights are merged one by one as they are written, so
    memory holds one file of the checkpoint beside the model. Half precision is rounded without
    bias, as :meth:`AdapterLinear.merge` does, so that small updates survive in the mean. A tied
    output layer that was adapted is written beside the embedding, with ``tie_word_embeddings:
    false`` in the config. The tokenizer is not the model's: save it into the folder too.

    Parameters
    ----------
    model : nn.Module
        Of transformers, with layers adapted by :func:`adapt` or :func:`load_adapter`, merged or
        not, wrapped or not. Of a model sharded by ``fully_shard`` every rank calls it, with the
        same arguments, and rank 0 writes.
    path : str or path
        The folder, made if it does not exist. Weights of an earlier checkpoint in it go.
    max_shard_size : int
        Bytes of a file; a checkpoint of more gets several and an index.
    progress : bool
        Show a bar over the tensors.
    dequantize : bool or torch.dtype
        Write quantised weights, adapted or not, as dense ones in this dtype, or with True in the
        model's; the config then says nothing of quantising.

    Raises
    ------
    NotADirectoryError
        If ``path`` is a file.
    TypeError, ValueError
        If an argument is wrong, no layer is adapted, the model has no config of transformers, is
        under PEFT or quantised without ``dequantize``, a buffer is sparse, a merged weight would
        not be finite or is computed anew at every forward, the adapters are off in
        :func:`disabled`, or the folder holds an adapter, which would be loaded on top. Nothing is
        written.
    """
    largest, progress = _shard_size(max_shard_size), plain_value("progress", "bool", progress)
    folder = as_path("path", path)
    root = _checked(model)
    dtype = _dense_dtype(root, dequantize)
    refuse_mixed(folder, *ADAPTER)
    apart = tied_layers(root, adapted_layers(root))
    entries = _as_stored(root, _without_aliases(root, _entries(root, dtype), keep=bool(apart)))
    shards = list(_shards(entries, largest))
    bar = tqdm(total=len(entries), disable=not progress)
    with bar, of_one_rank(root) as writes:
        if writes:
            with filling(folder, EARLIER) as files:
                _write_configs(files, root, untied=bool(apart))  # first: it may be refused
                _write_weights(files, entries, shards, bar)
        else:
            _take_part(entries, shards)


def _shard_size(given: int) -> int:
    size: int = plain_value("max_shard_size", "int", given)
    if size < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, got {size}")
    return size


def _checked(model: nn.Module) -> nn.Module:
    refuse_flattened(model, UNSHARDED)
    root = unwrapped(model)
    reshard(root)
    if under_peft.holds(root):
        raise ValueError(
            "model must not be under PEFT, which writes merged models itself: "
            "model.merge_and_unload().save_pretrained(path)"
        )
    layers = require_adapted(root)
    under_peft.refuse_others(root)
    switch.check_on(layers.values(), "to_merged")
    if not hasattr(getattr(root, "config", None), "save_pretrained"):
        raise ValueError(
            f"model must have a config of transformers, got {type(root).__name__} without: "
            "qk.merge(model), then save its state_dict()"
        )
    for name, layer in layers.items():
        with named(name):
            merging.require_stored_weight(layer)
    return root


def _dense_dtype(root: nn.Module, dequantize: bool | torch.dtype) -> torch.dtype:
    """What quantised weights are to be written in, if there are any."""
    merging.check_dequantize(dequantize)
    few = [name for name, p in parameters(root).items() if quantised.is_quantised(p)]
    if not few and getattr(root.config, "quantization_config", None) is not None:
        raise ValueError(
            "model must hold plain weights, got a quantization_config in its config, by which "
            "from_pretrained would read them: dequantise the model and delete the entry first"
        )
    if few and dequantize is False:
        raise ValueError(
            f"model must be dense to be written merged, got quantised weights, {few[0]} among "
            f"{len(few)}: give dequantize=True to write them dense"
        )
    own: torch.dtype = next(p.dtype for n, p in parameters(root).items() if n not in few)
    return own if isinstance(dequantize, bool) else dequantize


# --- the tensors


def _entries(root: nn.Module, dtype: torch.dtype) -> dict[str, Entry]:
    """Everything that the plain model's state dict would hold, quantised weights in ``dtype``."""
    ignored = getattr(root, "_keys_to_ignore_on_save", None) or ()
    return {
        name: entry
        for prefix, module in modules(root).items()
        for name, entry in _entries_of(root, prefix, module, dtype)
        if name not in ignored
    }


def _entries_of(
    root: nn.Module, prefix: str, module: nn.Module, dtype: torch.dtype
) -> Iterator[tuple[str, Entry]]:
    own = module.trainables if isinstance(module, AdapterLinear) else ()
    held: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    for key, tensor in held.items():
        if tensor is None or key in own or key in module._non_persistent_buffers_set:
            continue
        name = f"{prefix}.{key}" if prefix else key
        refuse_sparse(name, tensor)
        few = quantised.quantised(tensor, module)
        written = tensor.dtype if few is None else dtype
        outline = torch.empty(quantised.shape_of(tensor), dtype=written, device="meta")
        if isinstance(module, AdapterLinear) and key == "weight":
            yield name, Entry(outline, partial(_merged, prefix, module, written))
        elif few is not None:
            yield name, Entry(outline, partial(few.dense, written))
        else:
            yield name, Entry(outline, partial(_value, root, name, tensor))


def _value(root: nn.Module, name: str, tensor: Tensor) -> Tensor:
    return whole(values_of(root, {name: tensor})[name])


def _merged(name: str, layer: AdapterLinear, dtype: torch.dtype) -> Tensor:
    with named(name):
        return merging.merged_parameter(layer, dtype).data


def _without_aliases(root: nn.Module, entries: dict[str, Entry], keep: bool) -> dict[str, Entry]:
    """Without further names of a tensor that loading ties again, unless it is told to ``keep``."""
    tied = getattr(root, "all_tied_weights_keys", None) or getattr(root, "_tied_weights_keys", None)
    patterns = [] if keep else [re.compile(pattern) for pattern in tied or ()]
    held = parameters(root)
    left = Counter(id(held[name]) for name in entries if name in held)
    kept = {}
    for name, entry in reversed(entries.items()):
        again = name in held and left[id(held[name])] > 1
        if again and any(pattern.search(name) for pattern in patterns):
            left[id(held[name])] -= 1
        else:
            kept[name] = entry
    return dict(reversed(kept.items()))


def _as_stored(root: Any, entries: dict[str, Entry]) -> dict[str, Entry]:
    """Under the names and in the form that checkpoints of this kind of model have.

    transformers keeps some models in another form than their files, such as the experts of a layer
    in one tensor: what has to be taken apart is held until it is written, renamed alone is not.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # releases before 5 know no other form
        return entries
    outlines = {name: entry.outline for name, entry in entries.items()}
    here = {id(outline): name for name, outline in outlines.items()}
    stored = revert_weight_conversion(root, dict(outlines))
    from_ = {name: here.get(id(outline)) for name, outline in stored.items()}
    converted = entries.keys() - set(from_.values())
    values = {name: entries[name].make() for name in entries if name in converted}
    made = revert_weight_conversion(root, values) if values else {}
    found = {}
    for name, outline in stored.items():
        old = from_[name]
        found[name] = Entry(outline, partial(made.pop, name)) if old is None else entries[old]
    return found


# --- the files


def _shards(entries: dict[str, Entry], largest: int) -> Iterator[list[str]]:
    """The names of each file, filled in order."""
    names: list[str] = []
    size = 0
    for name, entry in entries.items():
        if names and size + entry.nbytes > largest:
            yield names
            names, size = [], 0
        names.append(name)
        size += entry.nbytes
    yield names


def _write_weights(
    files: Path, entries: dict[str, Entry], shards: list[list[str]], bar: Any
) -> None:
    where: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = WEIGHTS if len(shards) == 1 else SHARD.format(i + 1, len(shards))
        tensors = {}
        for name in names:
            tensors[name] = for_file(entries[name].make())
            bar.update()
        save_tensors(files / file, tensors, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(entry.nbytes for entry in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_text(files / INDEX, json.dumps(index, indent=2) + "\n")


def _take_part(entries: dict[str, Entry], shards: list[list[str]]) -> None:
    """In gathering the weights that another rank writes."""
    for name in (name for names in shards for name in names):
        entries[name].make()


def _plain_kind(root: nn.Module) -> type:
    """The model's own class, which ``fully_shard`` replaces by one that comes from it."""
    kinds = type(root).__mro__
    return next(k for k in kinds if all(b.__name__ != "FSDPModule" for b in k.__mro__))


def _write_configs(files: Path, root: nn.Module, untied: bool) -> None:
    config: Any = copy.deepcopy(root.config)
    config.architectures = [_plain_kind(root).__name__]
    vars(config).pop("quantization_config", None)
    dtype = "dtype" if hasattr(config, "dtype") else "torch_dtype"  # before transformers 4.56
    setattr(config, dtype, str(root.dtype).removeprefix("torch."))
    if untied:
        config.tie_word_embeddings = False
        getattr(config, "get_text_config", lambda: config)().tie_word_embeddings = False
    config.save_pretrained(files)
    if getattr(root, "can_generate", lambda: False)():
        generation: Any = root.generation_config
        if generation is not None:
            generation.save_pretrained(files)
