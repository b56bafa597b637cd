"""Ranks that differ share no start: a rank's factors are those of its own weight, or none are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pivot_matrices import gaussian
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels.linalg import distributed_start, kron_factors, pivoted_qr, truncated_svd

SHARED = "must be the same on all ranks"
Call = Callable[[int, str], Any]


def weights() -> list[Tensor]:
    return [gaussian(16, 12), gaussian(12, 16, 1).bfloat16(), gaussian(12, 12, 2).float()]


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 12))
    for seed, layer in enumerate(model):
        layer.weight.data = gaussian(*layer.weight.shape, seed).float()
    return model


def _changed(rank: int, change: Callable[[Tensor], Tensor], at: int = 1) -> list[Tensor]:
    """The weights, of which rank 1 has one changed."""
    given = weights()
    if rank == 1:
        given[at] = change(given[at].clone())
    return given


def _one_element(w: Tensor) -> Tensor:
    w[-1, -1] = w[-1, -1] * 2
    return w


def _adapt(own: int, adapter: str, /, **options: Any) -> None:
    """Rank 1's middle layer differs."""
    model = net()
    if own == 1:
        model[1].weight.data = -model[1].weight.data
    qk.adapt(model, ["0", "1", "2"], adapter=adapter, progress=False, **options)


def _adapt_as(options: dict[str, Any], others: dict[str, Any]) -> Call:
    """Rank 1 with other options over the same weights."""

    def call(rank: int, folder: str) -> None:
        own: dict[str, Any] = {
            "target_modules": ["0", "1", "2"],
            "adapter": "qr",
            "progress": False,
        }
        qk.adapt(net(), **(own | (options if rank == 0 else others)))

    return call


def _adapt_gradient(rank: int, folder: str) -> None:
    model = net()
    if rank == 0:
        model[0].weight.grad = torch.ones_like(model[0].weight)
    qk.adapt(model, ["0"], adapter="lora_xs", rank=2, basis="gradient", progress=False)


# What the ranks call, and the words of the error that both must get.
CALLS: dict[str, tuple[Call, str]] = {
    "one element": (
        lambda rank, _: distributed_start(pivoted_qr, _changed(rank, _one_element), rank=2),
        "weights[1] must be equal on all ranks",
    ),
    "one sign of zero": (
        lambda rank, _: distributed_start(
            pivoted_qr, [torch.tensor([[1.0, -0.0 if rank else 0.0], [0.0, 1.0]])], rank=2
        ),
        "weights[0] must be equal on all ranks",
    ),
    "two rows changed places": (
        lambda rank, _: distributed_start(
            kron_factors, _changed(rank, lambda w: w.flip(0)), rank=2
        ),
        "weights[1] must be equal on all ranks",
    ),
    "in a cache": (
        lambda rank, folder: distributed_start(
            pivoted_qr, _changed(rank, _one_element, 0), cache=f"{folder}/cache", rank=2
        ),
        "weights[0] must be equal on all ranks",
    ),
    "dtype": (
        lambda rank, _: distributed_start(pivoted_qr, _changed(rank, Tensor.half), rank=2),
        f"the shape and dtype of weights[1] {SHARED}",
    ),
    "shape": (
        lambda rank, _: distributed_start(pivoted_qr, _changed(rank, lambda w: w.T), rank=2),
        f"the shape and dtype of weights[1] {SHARED}",
    ),
    "number": (
        lambda rank, _: distributed_start(pivoted_qr, weights()[rank:], rank=2),
        f"the number of weights {SHARED}, got 3 on rank 0 and 2 on rank 1",
    ),
    "rank": (
        lambda rank, _: distributed_start(pivoted_qr, weights(), rank=2 + rank),
        f"rank {SHARED}, got 2 on rank 0 and 3 on rank 1",
    ),
    "an option that one leaves out": (
        lambda rank, _: distributed_start(
            truncated_svd, weights(), rank=2, **{"seed": 1} if rank else {}
        ),
        f"seed {SHARED}, got none on rank 0 and 1 on rank 1",
    ),
    "kind of start": (
        lambda rank, _: distributed_start(
            kron_factors, weights(), rank=2, start="svd" if rank else "qr"
        ),
        f"start {SHARED}, got qr on rank 0 and svd on rank 1",
    ),
    "factorisation": (
        lambda rank, _: distributed_start(pivoted_qr if rank else truncated_svd, weights(), rank=2),
        f"factorisation {SHARED}, got truncated_svd on rank 0 and pivoted_qr on rank 1",
    ),
    "cache on one rank": (
        lambda rank, folder: distributed_start(
            pivoted_qr, weights(), cache=f"{folder}/one" if rank else None, rank=2
        ),
        f"cache {SHARED}, got none on rank 0 and a folder on rank 1",
    ),
    "qr": (lambda rank, _: _adapt(rank, "qr", rank=2), "1.weight must be equal on all ranks"),
    "ohora": (lambda rank, _: _adapt(rank, "ohora"), "1.weight must be equal on all ranks"),
    "kaiming": (
        lambda rank, _: _adapt(rank, "ohora", start="kaiming"),
        "1.weight must be equal on all ranks",
    ),
    "lora_xs": (
        lambda rank, _: _adapt(rank, "lora_xs", rank=2),
        "1.weight must be equal on all ranks",
    ),
    "random": (
        lambda rank, _: _adapt(rank, "lora_xs", rank=2, basis="random"),
        "1.weight must be equal on all ranks",
    ),
    "layers": (
        _adapt_as({"target_modules": ["0", "1"]}, {"target_modules": ["0"]}),
        f"the number of layers {SHARED}, got 2 on rank 0 and 1 on rank 1",
    ),
    "no such layer on one rank": (
        _adapt_as({}, {"target_modules": ["9"]}),
        "target_modules",
    ),
    "a gradient on one rank": (_adapt_gradient, "needs the mean gradient"),
    "strength": (
        _adapt_as({"scaling": 1.0}, {"scaling": 2.0}),
        f"scaling {SHARED}, got 1.0 on rank 0 and 2.0 on rank 1",
    ),
    "adapter": (
        _adapt_as({"rank": 2}, {"adapter": "lora_xs", "rank": 2}),
        f"adapter {SHARED}, got qr on rank 0 and lora_xs on rank 1",
    ),
}


def _message(call: Call, rank: int, folder: str) -> str:
    try:
        call(rank, folder)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    messages = {name: _message(call, rank, folder) for name, (call, _) in CALLS.items()}
    # Alone, each has what is its own.
    model = net()
    model[0].weight.data *= 1.0 + rank
    qk.adapt(model, ["0"], adapter="qr", rank=12, progress=False, distributed=False)
    layer = model[0]
    left = (layer.q @ layer.r - layer.weight).norm() / layer.weight.norm()
    messages["alone"] = "own factors" if float(left) < 1e-5 else f"off by {left}"
    torch.save(messages, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", CALLS)
def test_ranks_that_differ_are_refused_on_both(name: str, answers: list[dict[str, str]]) -> None:
    for messages in answers:
        assert messages[name].startswith("ValueError: ")
        assert CALLS[name][1] in messages[name]


def test_ranks_that_start_alone_have_their_own_factors(answers: list[dict[str, str]]) -> None:
    assert [messages["alone"] for messages in answers] == ["own factors", "own factors"]
