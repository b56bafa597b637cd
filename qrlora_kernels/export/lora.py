"""A standard LoRA folder, as PEFT writes it: what most loaders read."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..adapters.options import plain_value
from ..bank import AdapterBank
from ..files import as_path, filling, save_tensors, write_text
from ..linalg.checks import check_choice
from ..model.manifest import for_file
from ..model.names import under
from ..model.saving import of_one_rank
from .beside import TO_MERGED, state_of
from .factors import check_dtype, padded, pairs_of
from .folder import MLX, MODEL, refuse_mixed
from .records import Source
from .servers import Draft, Form, Server, check
from .source import source_of
from .under_peft import PREFIX

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def to_lora(
    model: nn.Module | AdapterBank | str | os.PathLike[str],
    path: str | os.PathLike[str],
    form: Form = "padded",
    for_: Server | None = None,
    *,
    dtype: torch.dtype | None = None,
    truncate: int | None = None,
    adapter: str | None = None,
) -> dict[str, float]:
    """Write an adapter as a folder of plain LoRA: ``adapter_config.json`` and one weights file.

    QR-LoRA and LoRA-XS are low-rank as they are: A = R̃ and B = s Q diag(λ), or A = Σ V^T and B =
    s U C^T, exact up to one rounding of B. Directions that λ leaves at zero are left out. The
    adapter alone is written, merged or not, at the strength that it has now. Heads that trained in
    full go into ``modules_to_save``. Both files are put in place together.

    Parameters
    ----------
    model : nn.Module, AdapterBank or path
        A model with adapted layers, wrapped or not; one under PEFT with an adapter of ours; a bank;
        or a file of :func:`save_adapter` that holds its factors. Of a model sharded by
        ``fully_shard`` every rank calls it, with the same arguments, and rank 0 writes.
    path : str or path
        The folder, made if it does not exist.
    form : "padded" or "pattern"
        Where ranks differ: zeros up to the largest, with ``r = lora_alpha``, which every loader
        reads right; or each layer's own rank in ``rank_pattern`` and ``alpha_pattern``, smaller,
        for PEFT and vLLM from 0.32 on alone.
    for_ : "peft", "vllm", "sglang" or "llama.cpp", optional
        The server that it is meant for: what that would refuse or misread is refused here, what it
        misses is added (zeros for SGLang), and what it must be started with is a warning.
    dtype : torch.dtype, optional
        Of A and B: float32 by default, float16 or bfloat16. Heads keep theirs.
    truncate : int, optional
        The largest rank. An update of more, or OHoRA's, is replaced by its best approximation, and
        a warning states the error.
    adapter : str, optional
        Which one, of a bank or of a model under PEFT where not exactly one is active.

    Returns
    -------
    dict of float
        ‖ΔW − B A‖ / ‖ΔW‖ (Frobenius) of each layer that ``truncate`` cut down; empty otherwise.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If a file to read is not there, or ``path`` is a file.
    TypeError, ValueError
        If an argument is wrong, no layer is adapted, an update has no low-rank form or is not
        finite, something trained that no LoRA file holds (the bias of an adapted layer), a bank's
        model or one under PEFT is sharded, the folder holds a model or an adapter of MLX, or the
        server ``for_`` would not read the folder right. Nothing is written.
    """
    check_choice("form", form, get_args(Form))
    if for_ is not None:
        check_choice("for_", for_, get_args(Server))
    rank = check_truncate(truncate)
    kept, folder = check_dtype(dtype), as_path("path", path)
    refuse_mixed(folder, *MODEL, *MLX)
    source = source_of(model, adapter)
    pairs, errors = pairs_of(source.updates, rank, kept)
    source = _with_namesakes(source)
    draft = Draft(source, form, pairs, folder)
    check(for_, draft)
    tell_truncated(errors)
    with of_one_rank(source.root) as writes:
        if writes:
            _write(draft)
    return errors


def _write(draft: Draft) -> None:
    with filling(draft.folder) as files:
        save_tensors(files / WEIGHTS, _tensors(draft), {"format": "pt"})
        write_text(files / CONFIG, json.dumps(_config(draft), indent=2) + "\n")


def check_truncate(truncate: int | None) -> int | None:
    rank: int | None = plain_value("truncate", "int | None", truncate)
    if rank is not None and rank < 1:
        raise ValueError(f"truncate must be None or at least 1, got {rank}")
    return rank


def tell_truncated(errors: dict[str, float]) -> None:
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        warnings.warn(
            f"truncated {len(errors)} updates; relative error up to {errors[worst]:.2g} ({worst})",
            stacklevel=3,
        )


def _with_namesakes(source: Source) -> Source:
    """With the modules too that PEFT takes for a head because their names end in its name."""
    heads = dict(source.heads)
    for name, module in source.modules.items():
        if not any(name.endswith(head) for head in source.heads) or under(name, [*source.heads]):
            continue
        if any(under(layer, [name]) for layer in source.updates):
            raise ValueError(
                f"loaders would take {name} for a head that trained in full ("
                f"{', '.join(source.heads)}) by the end of its name, and it holds adapted layers: "
                f"{TO_MERGED}"
            )
        assert source.root is not None
        if any(True for _ in module.parameters()):
            heads[name] = state_of(source.root, name)
    return Source(source.updates, heads, source.root)


def _tensors(draft: Draft) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, pair in draft.pairs.items():
        a, b = padded(pair, draft.rank) if draft.form == "padded" else pair
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    for name, state in draft.source.heads.items():
        tensors |= {f"{PREFIX}{name}.{key}": for_file(t) for key, t in state.items()}
    return tensors


def _config(draft: Draft) -> dict[str, Any]:
    source, rank = draft.source, draft.rank
    # The first expression that fits counts, and a name may be the end of another.
    longest_first = sorted(draft.pairs, key=len, reverse=True)
    own = {name: draft.pairs[name].rank for name in longest_first if draft.form == "pattern"}
    return {
        "peft_type": "LORA",
        # With SEQ_CLS, PEFT would ask for a head whether one trained or not.
        "task_type": None,
        "base_model_name_or_path": source.base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": own,
        "alpha_pattern": own,
        "target_modules": list(draft.pairs),
        "exclude_modules": _not_meant(source, draft.pairs),
        "modules_to_save": list(source.heads) or None,
        "fan_in_fan_out": any(update.conv1d for update in source.updates.values()),
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _not_meant(source: Source, pairs: Iterable[str]) -> list[str] | None:
    """Modules that a layer's full name fits as well, being the end of theirs."""
    ends = tuple(f".{name}" for name in pairs)
    return [name for name in source.modules if name not in pairs and name.endswith(ends)] or None
