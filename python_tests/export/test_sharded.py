"""Exports of a model that fully_shard has spread over two ranks: the files of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from exported import IDS, RANKS, adapt, adapted, files_in, llama, refusal
from torch import nn
from torch.distributed.fsdp import fully_shard

import qrlora_kernels as qk

TIED = {"lm_head": 3, "model.layers.0.self_attn.q_proj": 2}
MODELS: dict[str, Any] = {
    "qr": lambda: adapted("llama", "qr", torch.bfloat16),
    "lora_xs": lambda: adapted("llama", "lora_xs", torch.bfloat16),
    "ohora": lambda: adapt(llama(), dict.fromkeys(RANKS["llama"], 2), "ohora"),
    "head": lambda: adapted("bert"),
    "tied": lambda: adapt(llama(tied=True), TIED),
}


def spread(model: Any, each: bool) -> nn.Module:
    blocks = model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers
    for block in blocks if each else ():
        fully_shard(block)
    return fully_shard(model)


def write(model: nn.Module, folder: Path) -> None:
    qk.to_lora(model, folder / "lora", truncate=4)
    qk.to_merged(model, folder / "merged", max_shard_size=9000)
    if "head" not in folder.name and "tied" not in folder.name:
        qk.to_mlx(model, folder / "mlx", truncate=4)


def rank_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    said = {}
    for name, make in MODELS.items():
        for each in (False, True):
            for warm in (False, True):
                model = spread(make(), each)
                if warm:  # a forward leaves whole parameters in the modules
                    with torch.no_grad():
                        model(input_ids=IDS)
                layer = next(iter(qk.adapted_layers(model).values()))
                said[f"{name}-{each}-{warm}"] = [
                    refusal(call)
                    for call in (layer.merge, lambda m=model: qk.merge(m))  # type: ignore[misc]
                ]
                write(model, Path(folder, f"{name}-{each}-{warm}"))
    torch.save(said, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_every_rank_gathers_and_one_writes(tmp_path: Path) -> None:
    """They were refused; merging ended in an error of torch, or was undone by a gathering."""
    mp.spawn(rank_of_two, args=(str(tmp_path),), nprocs=2)
    for name, make in MODELS.items():
        write(make(), tmp_path / name)
        for case in (f"{name}-{each}-{warm}" for each in (False, True) for warm in (False, True)):
            for kind in ("lora", "merged", "mlx"):
                wanted = files_in(tmp_path / name / kind)
                assert files_in(tmp_path / case / kind) == wanted
                for file in wanted:
                    theirs = (tmp_path / case / kind / file).read_bytes()
                    assert theirs == (tmp_path / name / kind / file).read_bytes(), (case, file)
    for rank in range(2):
        for case, answers in torch.load(tmp_path / f"{rank}.pt").items():
            for answer in answers:
                if "tied to" not in answer:
                    assert "write the merged model with qk.to_merged" in answer, case
