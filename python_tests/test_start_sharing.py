"""The folder of factorisations, and starts shared over ranks: alone and through ``adapt``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pivot_matrices import gaussian
from torch import nn

import qrlora_kernels as qk
from qrlora_kernels.linalg import (
    cache,
    cached_start,
    distributed,
    distributed_start,
    kron_factors,
    pivoted_qr,
    truncated_svd,
)
from qrlora_kernels.linalg.distributed import share_out
from qrlora_kernels.linalg.ranks import _wire_device

WEIGHTS = [gaussian(48, 36), gaussian(36, 48, 1).bfloat16(), gaussian(24, 24, 2).float()]
STARTS = [
    (pivoted_qr, {"tau": 0.5}),
    (pivoted_qr, {"tau": 0.5, "rank_rule": "energy", "exact": False}),
    (truncated_svd, {"rank": 3}),
    (kron_factors, {"start": "svd"}),
]
# Every source of a start: the three factorisations and all that is drawn at random.
ADAPTERS: list[dict[str, Any]] = [
    {"adapter": "qr", "tau": 0.5},
    {"adapter": "lora_xs", "rank": 4},
    {"adapter": "lora_xs", "rank": 4, "basis": "random"},
    {"adapter": "lora_xs", "rank": 4, "basis": "random_svd"},
    {"adapter": "ohora"},
    {"adapter": "ohora", "start": "kaiming"},
]
LAYERS = ("0", "2", "4")
# With a rank, the options by which a QRLinear starts.
QR_OPTIONS = {"tau": None, "rank_rule": "magnitude", "max_rank": None}


def assert_same(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    fields = dataclasses.asdict(one) if dataclasses.is_dataclass(one) else one._asdict()
    for name, value in fields.items():
        other = getattr(two, name)
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name


@pytest.mark.parametrize(("start", "options"), STARTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_second_start_reads_files(
    start: Callable[..., Any], options: dict[str, Any], tmp_path: Path
) -> None:
    first = cached_start(start, WEIGHTS, tmp_path, **options)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(written) == len(WEIGHTS)
    second = cached_start(start, WEIGHTS, tmp_path, progress=False, **options)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == written
    for computed, one, two in zip(start(WEIGHTS, **options), first, second, strict=True):
        assert_same(computed, one)
        assert_same(computed, two)


def test_only_what_is_missing_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_start(pivoted_qr, WEIGHTS[:2], tmp_path, rank=4)
    changed = WEIGHTS[1].clone()
    changed[0, 0] += 1
    before = len(list(tmp_path.iterdir()))
    cached_start(pivoted_qr, [WEIGHTS[0], changed, WEIGHTS[0].T], tmp_path, rank=4)
    assert len(list(tmp_path.iterdir())) == before + 2
    cached_start(pivoted_qr, WEIGHTS[:1], tmp_path, rank=5)
    assert len(list(tmp_path.iterdir())) == before + 3
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    cached_start(pivoted_qr, WEIGHTS[:1], tmp_path, rank=4)
    assert len(list(tmp_path.iterdir())) == before + 4


def test_broken_file_is_replaced(tmp_path: Path) -> None:
    [good] = cached_start(pivoted_qr, WEIGHTS[:1], tmp_path, rank=4)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    [again] = cached_start(pivoted_qr, WEIGHTS[:1], tmp_path, rank=4)
    assert_same(good, again)
    assert file.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [file]


def test_files_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    """Others who share the folder can read them."""
    cached_start(pivoted_qr, WEIGHTS[:1], tmp_path / "cache", rank=4)
    [file] = (tmp_path / "cache").iterdir()
    plain = tmp_path / "plain"
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode


def test_unknown_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="start must be one of"):
        cached_start(torch.linalg.qr, WEIGHTS, tmp_path)
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed_start(pivoted_qr, WEIGHTS)


def test_share_out_balances() -> None:
    owners = share_out([(10, 10), (40, 10), (10, 20), (10, 10)], 2)
    assert owners == [1, 0, 1, 1]
    assert share_out([], 3) == []


def test_error_of_a_cached_start_names_the_matrix_of_the_list(tmp_path: Path) -> None:
    cached_start(pivoted_qr, WEIGHTS, tmp_path, rank=4)
    with pytest.raises(ValueError, match=r"weights\[3\] must not be zero"):
        cached_start(pivoted_qr, [*WEIGHTS, torch.zeros(9, 9)], tmp_path, rank=4)


def test_results_go_over_a_device_that_the_backend_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert _wire_device(cpu, "cpu:gloo,cuda:nccl") == cpu
    assert _wire_device(cpu, "cuda:nccl") == torch.device("cuda", 1)
    assert _wire_device(cuda, "cpu:gloo,cuda:nccl") == cuda
    assert _wire_device(cuda, "cpu:mpi") == cpu


def _net() -> nn.Sequential:
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(
        nn.Linear(36, 48), nn.Tanh(), nn.Linear(48, 36), nn.Tanh(), nn.Linear(36, 36)
    )
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return net


def _adapt(net: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    qk.adapt(net, list(LAYERS), progress=False, **options)
    return net.state_dict()


def _forbid_computing(patch: pytest.MonkeyPatch) -> None:
    def start_some(start: Any, weights: Any, chosen: list[int], options: Any) -> dict[int, Any]:
        assert chosen == [], "a matrix was factorised"
        return {}

    patch.setattr(cache, "start_some", start_some)
    patch.setattr(distributed, "start_some", start_some)


@pytest.mark.parametrize("options", ADAPTERS, ids=str)
def test_second_adapt_reads_files(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    fresh = _adapt(_net(), **options)
    torch.manual_seed(0)
    first = _adapt(_net(), cache=tmp_path / "new", **options)
    _forbid_computing(monkeypatch)
    torch.manual_seed(0)
    second = _adapt(_net(), cache=tmp_path / "new", **options)
    assert list(fresh) == list(first) == list(second)
    for name, value in fresh.items():
        assert torch.equal(value, first[name]), name
        assert torch.equal(value, second[name]), name


def test_error_of_a_cached_adapt_names_the_layer(tmp_path: Path) -> None:
    _adapt(_net(), cache=tmp_path, rank=4)
    net = _net()
    net[2].weight.data.zero_()
    with pytest.raises(ValueError, match=r"^2\.weight must not be zero"):
        _adapt(net, cache=tmp_path, rank=4)


def _join(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)


def _message(task: Callable[[], Any]) -> str:
    try:
        task()
    except (ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _rank(rank: int, folder: str) -> None:
    _join(rank, folder)
    results = [distributed_start(start, WEIGHTS, **options) for start, options in STARTS]
    bad = [*WEIGHTS, torch.zeros(30, 30)]
    results.append(_message(lambda: distributed_start(pivoted_qr, bad, rank=2)))
    results.append(_message(lambda: distributed_start(pivoted_qr, bad[rank:], rank=2)))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_end_with_the_same_bits(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    left, right = (torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in (0, 1))
    for (start, options), one, two in zip(STARTS, left, right, strict=False):
        for computed, a, b in zip(start(WEIGHTS, **options), one, two, strict=True):
            assert_same(a, b)
            if start is pivoted_qr:
                assert_same(computed, a)
    for results in (left, right):
        zero, differ = results[len(STARTS) :]
        assert zero.startswith("ValueError: ")
        assert "weights[3] must not be zero" in zero
        assert differ.startswith("ValueError: the number of weights must be the same on all ranks")


def _adapting_rank(rank: int, folder: str) -> None:
    _join(rank, folder)
    torch.manual_seed(rank)  # what a rank draws by itself differs
    states = [_adapt(_net(), **options) for options in ADAPTERS]
    own = f"{folder}/cache{rank}"  # rank 0's holds one layer, rank 1's none
    if rank == 0:
        cached_start(pivoted_qr, [_net()[2].weight], own, rank=3, **QR_OPTIONS)
    states += [_adapt(_net(), cache=own, rank=3) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        _forbid_computing(patch)
        states.append(_adapt(_net(), cache=own, rank=3))
        # What one rank alone has left is sent to the other.
        for file in Path(own).iterdir() if rank == 1 else ():
            file.unlink()
        states.append(_adapt(_net(), cache=own, rank=3))
    broken = _net()
    broken[2].weight.data[0, 0] = torch.nan  # rank 1's share
    blocked = Path(folder) / "blocked"
    if rank == 1:
        blocked.touch()
    folders = (Path(folder) / "whole", blocked)
    messages = [
        _message(lambda: _adapt(broken, rank=3)),
        _message(lambda: _adapt(broken, adapter="lora_xs", rank=3, basis="random")),
        _message(lambda: _adapt(_net(), rank=3, cache=folders[rank])),
    ]
    if rank == 0:  # alone: would wait for ever if the work were shared
        states.append(_adapt(_net(), rank=3, distributed=False))
    files = sorted(file.name for file in Path(own).iterdir())
    torch.save((states, messages, files), f"{folder}/adapt{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_adapt_to_the_same_bits(tmp_path: Path) -> None:
    mp.spawn(_adapting_rank, args=(str(tmp_path),), nprocs=2)
    (left, left_errors, left_files), (right, right_errors, right_files) = (
        torch.load(tmp_path / f"adapt{r}.pt") for r in (0, 1)
    )
    assert len(left) == len(right) + 1
    for one, two in zip(left, right, strict=False):
        assert list(one) == list(two)
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(left_files) == len(LAYERS)
    assert left_files == right_files
    for own, other in ((right_errors[i], left_errors[i]) for i in (0, 2)):
        message = own.partition(": ")[2]
        assert own != "no error"
        assert message in other
        assert "on rank 1: " in other
    assert right_errors[0].startswith("ValueError: 2.weight must be finite")
    assert left_errors[0].startswith("ValueError: on rank 1: 2.weight must be finite")
    # Random factors are drawn, and their weights looked at, by every rank.
    assert left_errors[1] == right_errors[1]
    assert left_errors[1].startswith("ValueError: 2.weight must be finite")
    assert "cache must be a folder" in left_errors[2]
