"""Two processes train one bank to the numbers of one."""

from __future__ import annotations

from pathlib import Path

import bank_model
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import qrlora_kernels as qk

NAMES = ["a", "b", "b", "c", "a", "c"]


def _train(rows: list[slice]) -> dict[str, dict[str, torch.Tensor]]:
    """By a batch of six rows a step, of which this process has ``rows``; nobody names "d"."""
    torch.manual_seed(0)
    net = bank_model.Net().double()
    qk.adapt(net, ["first", "second"], "qr", rank=6, trainable=["head"], distributed=False)
    bank = qk.AdapterBank(net, 4)
    for i, name in enumerate("abcd"):
        bank.add(name, bank_model.state(net, i))
    optimizer = bank.adamw(lr=0.02)
    for number in range(10):
        x = bank_model.batch(6, seed=number)
        optimizer.zero_grad()
        for own in rows:
            with bank.use(NAMES[own]):
                F.cross_entropy(net(x[own]), torch.arange(6)[own] % 3, reduction="sum").backward()
        optimizer.step()
    return {name: bank.state(name) for name in "abcd"}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(_train([slice(0, 2), slice(2, 6)][rank : rank + 1]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_to_the_numbers_of_one(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    want = _train([slice(0, 6)])
    for name, state in want.items():
        for key, tensor in state.items():
            assert torch.equal(first[name][key], second[name][key])
            torch.testing.assert_close(first[name][key], tensor, rtol=1e-9, atol=1e-11)
