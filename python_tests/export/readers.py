"""What each server makes of a LoRA folder: its rule of reading, and ΔW of each layer by it.

A reader raises what its server would end in. Where a server is wrong without a word, so is its
reader: the tests compare with the ΔW that was meant.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

PREFIX = "base_model.model."
Deltas = dict[str, Tensor]


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by module; other tensors are left out."""
    held = tensors(folder)
    ends = ".lora_A.weight"
    names = [n.removeprefix(PREFIX).removesuffix(ends) for n in held if n.endswith(ends)]
    assert all(f"{PREFIX}{name}{ends}" in held for name in names)
    return {
        n: tuple(held[f"{PREFIX}{n}.lora_{x}.weight"].double() for x in "AB")  # type: ignore[misc]
        for n in names
    }


def others(folder: Path) -> list[str]:
    """The tensors that are no A or B."""
    return [n for n in tensors(folder) if not re.search(r"\.lora_[AB]\.weight$", n)]


def of_pattern(patterns: dict[str, int], name: str, default: int) -> int:
    """PEFT's ``get_pattern_key``: the first that fits."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def by_peft(folder: Path) -> Deltas:
    """PEFT, and vLLM from 0.32 on."""
    said, found = config(folder), {}
    for name, (a, b) in pairs(folder).items():
        assert any(name == t or name.endswith(f".{t}") for t in said["target_modules"])
        rank = of_pattern(said["rank_pattern"], name, said["r"])
        if not len(a) == b.shape[1] == rank:
            raise RuntimeError(f"size mismatch for {name}: {len(a)}, {rank}")
        scale = of_pattern(said["alpha_pattern"], name, said["lora_alpha"]) / rank
        found[name] = scale * b @ a
    return found


def by_vllm(folder: Path, max_lora_rank: int = 16) -> Deltas:
    said = config(folder)
    if max([said["r"], *said["rank_pattern"].values()]) > max_lora_rank:
        raise ValueError("rank is greater than max_lora_rank")
    if set(said["modules_to_save"] or []) - {"classifier", "score"}:
        raise ValueError("unsupported modules_to_save")
    for name in others(folder):
        if name.removeprefix(PREFIX).rpartition(".")[0] not in ("classifier", "score"):
            raise ValueError(f"{name} is unsupported LoRA weight")
    return by_peft(folder)


def by_old_vllm(folder: Path) -> Deltas:
    """Up to 0.31: one scale, and no patterns."""
    scale = config(folder)["lora_alpha"] / config(folder)["r"]
    return {name: scale * b @ a for name, (a, b) in pairs(folder).items()}


def by_sglang(folder: Path) -> Deltas:
    """One rank; q, k and v are stacked, as gate and up are; what has no layers.<i>. is dropped."""
    said, held = config(folder), pairs(folder)
    assert [file.name for file in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert isinstance(said["target_modules"], list)
    targets = {name.rpartition(".")[2] for name in said["target_modules"]}
    found = {}
    for name, (a, b) in held.items():
        if not re.search(r"(^|\.)layers\.\d+\.", name):
            continue
        assert name.rpartition(".")[2] in targets
        assert len(a) == b.shape[1] == said["r"]
        stem, _, leaf = name.rpartition(".")
        if leaf in ("q_proj", "k_proj", "v_proj"):
            for needed in ("q_proj", "v_proj"):
                if f"{stem}.{needed}" not in held:
                    raise KeyError(f"{stem}.{needed}")
        if leaf == "up_proj" and f"{stem}.gate_proj" not in held:
            raise KeyError(f"{stem}.gate_proj")
        found[name] = said["lora_alpha"] / said["r"] * b @ a
    return found


def by_llama_cpp(folder: Path) -> Deltas:
    """alpha over the columns of each B; any other tensor ends the conversion."""
    if others(folder):
        raise SystemExit(1)
    alpha = config(folder)["lora_alpha"]
    return {name: alpha / b.shape[1] * b @ a for name, (a, b) in pairs(folder).items()}


def by_mlx(folder: Path) -> Deltas:
    """Its own files, transposed; the scale is the factor itself."""
    said = config(folder)
    assert said["fine_tune_type"] == "lora"
    assert isinstance(said["num_layers"], int)
    own = said["lora_parameters"]
    held = load_file(folder / "adapters.safetensors")
    assert set(held) == {f"{name}.lora_{x}" for name in own["keys"] for x in "ab"}
    found = {}
    for name in own["keys"]:
        a, b = held[f"{name}.lora_a"].double(), held[f"{name}.lora_b"].double()
        assert a.shape[1] == len(b) == own["rank"]
        found[name] = own["scale"] * (a @ b).T
    return found


def assert_same(found: Deltas, wanted: Deltas, rtol: float = 1e-6) -> None:
    """Layers that were not meant must add nothing."""
    assert found.keys() >= wanted.keys()
    for name, delta in found.items():
        want = wanted.get(name, torch.zeros_like(delta))
        bound = rtol * float(want.abs().max())
        assert float((delta - want).abs().max()) <= bound, name
