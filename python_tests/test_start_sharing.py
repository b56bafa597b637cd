"""The folder of factorisations, and starts shared over ranks."""

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

from qrlora_kernels.linalg import (
    cache,
    cached_start,
    distributed_start,
    kron_factors,
    pivoted_qr,
    truncated_svd,
)
from qrlora_kernels.linalg.distributed import share_out

WEIGHTS = [gaussian(48, 36), gaussian(36, 48, 1).bfloat16(), gaussian(24, 24, 2).float()]
STARTS = [
    (pivoted_qr, {"tau": 0.5}),
    (pivoted_qr, {"tau": 0.5, "rank_rule": "energy", "exact": False}),
    (truncated_svd, {"rank": 3}),
    (kron_factors, {}),
]


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


def test_unknown_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="start must be one of"):
        cached_start(torch.linalg.qr, WEIGHTS, tmp_path)
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed_start(pivoted_qr, WEIGHTS)


def test_share_out_balances() -> None:
    owners = share_out([(10, 10), (40, 10), (10, 20), (10, 10)], 2)
    assert owners == [1, 0, 1, 1]
    assert share_out([], 3) == []


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = [distributed_start(start, WEIGHTS, **options) for start, options in STARTS]
    bad = [*WEIGHTS, torch.zeros(30, 30)]
    try:
        distributed_start(pivoted_qr, bad, rank=2)
    except ValueError as error:
        results.append(str(error))
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
    assert len(left) == len(right) == len(STARTS) + 1
    assert all("must not be zero" in results[-1] for results in (left, right))
