"""A LoRA adapter in the format of MLX (mlx-lm): its own files and names."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bank import AdapterBank
from ..files import as_path, filling, save_tensors, write_text
from ..model.saving import of_one_rank
from .beside import TO_MERGED
from .factors import check_dtype, padded, pairs_of
from .folder import MODEL, PEFT, refuse_mixed
from .lora import check_truncate, tell_truncated
from .records import Source
from .source import source_of

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
SAME_NAME = re.compile(r"model\.layers\.\d+\..*|lm_head")  # in transformers and in MLX


def to_mlx(
    model: nn.Module | AdapterBank | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    truncate: int | None = None,
    adapter: str | None = None,
) -> dict[str, float]:
    """Write an adapter as a folder that ``mlx_lm.load(base, adapter_path=path)`` reads.

    As :func:`to_lora` in its padded form, with ``lora_a`` [K, R] and ``lora_b`` [R, N] transposed
    against PEFT's and a scale of 1. Layers are written under their full names, which are the same
    in MLX for models that are built like Llama; a warning names others.

    Parameters
    ----------
    model, path, dtype, truncate, adapter
        As :func:`to_lora`.

    Returns
    -------
    dict of float
        The relative error of each layer that ``truncate`` cut down.

    Raises
    ------
    FileNotFoundError, NotADirectoryError, TypeError, ValueError
        As :func:`to_lora`, with an adapter of PEFT in the folder; also where something trained in
        full beside the adapters, or a layer is a Conv1D, for which MLX has other names, or tied,
        for which it has none.
    """
    rank, kept, folder = check_truncate(truncate), check_dtype(dtype), as_path("path", path)
    refuse_mixed(folder, *MODEL, *PEFT)
    source = source_of(model, adapter)
    _check(source)
    pairs, errors = pairs_of(source.updates, rank, kept)
    largest = max(pair.rank for pair in pairs.values())
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        a, b = padded(pair, largest)
        tensors[f"{name}.lora_a"] = a.t().contiguous()
        tensors[f"{name}.lora_b"] = b.t().contiguous()
    config = {
        "fine_tune_type": "lora",
        # Full names count over the whole model, however many of the last layers are asked for.
        "num_layers": 0,
        "lora_parameters": {"rank": largest, "scale": 1.0, "dropout": 0.0, "keys": list(pairs)},
    }
    tell_truncated(errors)
    with of_one_rank(source.root) as writes:
        if writes:
            _write(folder, tensors, config)
    return errors


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    with filling(folder) as files:
        save_tensors(files / WEIGHTS, tensors, {"format": "pt"})
        write_text(files / CONFIG, json.dumps(config, indent=2) + "\n")


def _check(source: Source) -> None:
    if source.heads:
        raise ValueError(
            f"{', '.join(source.heads)} trained in full, and MLX has no place for them: {TO_MERGED}"
        )
    for name, update in source.updates.items():
        if update.conv1d:
            raise ValueError(f"{name} is a Conv1D, which MLX calls otherwise: {TO_MERGED}")
        if update.tied:
            raise ValueError(
                f"{name} has a weight that is another module's too, and MLX has no layer there: "
                f"leave it out of the adapter, or {TO_MERGED}"
            )
    if others := [name for name in source.updates if not SAME_NAME.fullmatch(name)]:
        warnings.warn(
            f"MLX may call {others[0]} otherwise, and refuses names that it does not know",
            stacklevel=3,
        )
