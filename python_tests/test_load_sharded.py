"""An adapter file loaded into a model that fully_shard has spread over two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from saved import ADAPTERS, base, moved, refusal, x
from torch import nn
from torch.distributed.fsdp import fully_shard

import qrlora_kernels as qk

OTHER_RANKS: dict[str, dict[str, Any]] = {
    "qr": {"rank": 3},
    "lora_xs": {"rank": 3},
    "ohora": {"rank": 2},
}


def adapted(adapter: str, head: bool = True, **options: Any) -> nn.Module:
    """As ``saved.moved`` adapts it, nothing moved."""
    options = ADAPTERS[adapter] | options
    trainable = ["3"] if head else []
    model = base()
    return qk.adapt(model, ["0", "2"], adapter, trainable=trainable, progress=False, **options)


def spread(model: nn.Module, each: bool = False) -> nn.Module:
    for layer in (model[0], model[2], model[3]) if each else ():
        fully_shard(layer)
    return fully_shard(model)


def rank_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    said: dict[str, str] = {}
    for adapter in ADAPTERS:
        path = Path(folder, f"{adapter}.safetensors")
        for each in (False, True):
            _load_and_go_on(adapter, path, each, rank)
        for what, model in {
            "other ranks": adapted(adapter, **OTHER_RANKS[adapter]),
            "no head": adapted(adapter, head=False),
            "nothing adapted": base(),
        }.items():
            spread(model)
            said[f"{adapter}, {what}"] = refusal(lambda m=model, p=path: qk.load_adapter(m, p))
    model = spread(adapted("qr"))
    own = Path(folder, f"qr-{rank}.safetensors")  # of which rank 1 has none
    said["no file here"] = _failure(lambda: qk.load_adapter(model, own))
    others = moved("qr", head=True), adapted("qr")
    qk.save_adapter(others[rank], own)
    said["another file here"] = refusal(lambda: qk.load_adapter(model, own))
    changed = adapted("qr")
    with torch.no_grad():
        changed[2].weight.add_(0.1)
    spread(changed)
    path = Path(folder, "qr.safetensors")
    said["another base"] = refusal(lambda: qk.load_adapter(changed, path))
    torch.save(said, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _load_and_go_on(adapter: str, path: Path, each: bool, rank: int) -> None:
    model = spread(adapted(adapter), each)
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=0.01)
    qk.load_adapter(model, path)
    assert all(a is b for a, b in zip(trains, _trained(model), strict=True))
    wanted = moved(adapter, head=True)
    torch.testing.assert_close(model(x()), wanted(x()))
    again = path.with_name(f"{adapter}-{each}.safetensors")
    qk.save_adapter(model, again)
    model(x()).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(model(x()), wanted(x()))


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _failure(call: Any) -> str:
    with pytest.raises(Exception, match="no adapter file at") as caught:
        call()
    return str(caught.value)


def test_every_rank_takes_its_part(tmp_path: Path) -> None:
    """It was refused; and a rank whose file is missing must not leave the other waiting."""
    for adapter in ADAPTERS:
        qk.save_adapter(moved(adapter, head=True), tmp_path / f"{adapter}.safetensors")
    # Rank 0's file is there before the ranks start, so that only rank 1 misses one.
    qk.save_adapter(moved("qr", head=True), tmp_path / "qr-0.safetensors")
    mp.spawn(rank_of_two, args=(str(tmp_path),), nprocs=2)
    for adapter in ADAPTERS:
        for each in (False, True):
            fresh = qk.load_adapter(base(), tmp_path / f"{adapter}-{each}.safetensors", strict=True)
            assert helpers.same_bits(fresh(x()), moved(adapter, head=True)(x()))
    for rank in range(2):
        said = torch.load(tmp_path / f"{rank}.pt")
        for what in ("other ranks", "no head", "nothing adapted"):
            for adapter in ADAPTERS:
                assert "then call fully_shard" in said[f"{adapter}, {what}"]
        assert "on all ranks" in said["another file here"]
        assert "fingerprint" in said["another base"]
