"""Saved while FSDP has spread the model over two ranks."""

from __future__ import annotations

from pathlib import Path

import helpers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from saved import ADAPTERS, base, moved, refusal, x
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import qrlora_kernels as qk


def rank_of_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    said = {}
    for adapter in ADAPTERS:
        path = Path(folder) / f"{adapter}.safetensors"
        model = moved(adapter, head=True)
        fully_shard(model)
        model(x()).sum().backward()
        qk.save_adapter(model, path)
        assert path.is_file()  # on every rank, when the call returns
    changed = moved("qr")
    with torch.no_grad():
        changed[0].weight.add_(0.1)
    fully_shard(changed)
    qk.save_adapter(changed, Path(folder) / "changed.safetensors")
    plain = fully_shard(base())
    said["load plain"] = refusal(lambda: qk.load_adapter(plain, path))
    flat = FullyShardedDataParallel(
        moved("qr"), device_id=torch.device("cpu"), use_orig_params=True
    )
    never = Path(folder) / "never.safetensors"
    said["save flat"] = refusal(lambda: qk.save_adapter(flat, never))
    torch.save(said, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_whole_tensors_are_written_and_load_over_the_plain_base(tmp_path):
    """FSDP1 wrote a file that nothing loads, and fully_shard failed obscurely."""
    mp.spawn(rank_of_two, args=(str(tmp_path),), nprocs=2)
    for adapter in ADAPTERS:
        fresh = qk.load_adapter(base(), tmp_path / f"{adapter}.safetensors", strict=True)
        assert helpers.same_bits(fresh(x()), moved(adapter, head=True)(x())), adapter
    changed = moved("qr")
    with torch.no_grad():
        changed[0].weight.add_(0.1)
    fresh = qk.load_adapter(base(), tmp_path / "changed.safetensors")
    assert helpers.same_bits(fresh(x()), changed(x()))
    for rank in range(2):
        said = torch.load(tmp_path / f"{rank}.pt")
        for what, sentence in said.items():
            assert "shard" in sentence, (what, sentence)
        assert "summon_full_params" in said["save flat"]
    assert not (tmp_path / "never.safetensors").exists()
