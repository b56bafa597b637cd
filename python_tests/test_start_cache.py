"""The folder of factorisations when it fails: damaged entries, full disks, files in its place."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pivot_matrices import gaussian
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qrlora_kernels import files
from qrlora_kernels.fingerprint import digest_of
from qrlora_kernels.linalg import cache, cached_start, distributed_start, pivoted_qr

WEIGHTS = [gaussian(12, 9), gaussian(9, 12, 1).bfloat16()]


def same(one: Any, two: Any) -> bool:
    names = ("q", "r", "pivots", "diagonal")
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in names)


# --- damaged entries


def test_digest_of_knows_every_part() -> None:
    """Names, dtypes, shapes, bits and the text; not the order or the memory of the tensors."""
    t = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": t, "b": t + 1}
    whole = digest_of(tensors, "text")
    assert whole == digest_of({"b": t + 1, "a": t.T.contiguous().T}, "text")
    negative = t.clone()
    negative[0, 0] = -0.0
    others: list[tuple[dict[str, Tensor], str]] = [
        (tensors, "texT"),
        ({"a": t}, "text"),
        ({"a": t + 1, "b": t}, "text"),
        ({"a": t, "c": t + 1}, "text"),
        ({"a": t.reshape(3, 2), "b": t + 1}, "text"),
        ({"a": t.view(torch.int32), "b": t + 1}, "text"),
        ({"a": negative, "b": t + 1}, "text"),
    ]
    assert len({whole, *(digest_of(*other) for other in others)}) == len(others) + 1


def test_no_flipped_bit_of_an_entry_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is, in the head or in the data: the factors are those of the weight."""
    [good] = cached_start(pivoted_qr, WEIGHTS[:1], tmp_path, rank=2)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    computed = []
    start_some = cache.start_some

    def counted(*args: Any) -> dict[int, Any]:
        made: dict[int, Any] = start_some(*args)
        computed.extend(made)
        return made

    monkeypatch.setattr(cache, "start_some", counted)
    data = 8 + int.from_bytes(whole[:8], "little")
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        before = len(computed)
        [again] = cached_start(pivoted_qr, WEIGHTS[:1], tmp_path, rank=2)
        assert same(good, again), at
        if at >= data:
            assert len(computed) == before + 1, at
            assert file.read_bytes() == whole, at


def test_an_entry_without_a_digest_or_of_another_key_is_computed_again(tmp_path: Path) -> None:
    expected = pivoted_qr(WEIGHTS, rank=2)
    for w in WEIGHTS:
        cached_start(pivoted_qr, [w], tmp_path / str(w.dtype), rank=2)
    [first], [second] = ([*(tmp_path / str(w.dtype)).iterdir()] for w in WEIGHTS)
    whole = first.read_bytes()
    with safe_open(first, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _, values = json.loads(file.metadata()["entry"])
    tensors["q"] += 1
    save_file(tensors, first, {"values": values})  # as it was before there was a digest
    assert same(cached_start(pivoted_qr, WEIGHTS[:1], first.parent, rank=2)[0], expected[0])
    assert first.read_bytes() == whole
    second.write_bytes(whole)  # whole, but the factors of another weight
    assert same(cached_start(pivoted_qr, WEIGHTS[1:], second.parent, rank=2)[0], expected[1])


# --- folders that cannot be written


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for_safetensors(_: object, path: str, __: object) -> None:
    Path(path).write_bytes(b"part")
    raise SafetensorError("I/O error: No space left on device")


def _refuse(number: int) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("owner", "name", "failure", "reason"),
    [
        (files, "save_file", full, "No space left"),
        (files, "save_file", full_for_safetensors, "No space left"),
        (os, "open", _refuse(errno.EACCES), "Permission denied"),
        (os, "open", _refuse(errno.EROFS), "Read-only file system"),
        (os, "replace", _refuse(errno.EDQUOT), "quota"),
        (Path, "mkdir", _refuse(errno.EACCES), "Permission denied"),
        (Path, "mkdir", _refuse(errno.EROFS), "Read-only file system"),
    ],
    ids=[
        "full",
        "full-safetensors",
        "permission",
        "read-only",
        "quota",
        "no-folder",
        "no-folder-ro",
    ],
)
def test_factors_that_cannot_be_kept_are_returned_with_one_warning(
    owner: Any,
    name: str,
    failure: Callable[..., None],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path if owner is not Path else tmp_path / "missing"
    monkeypatch.setattr(owner, name, failure)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        results = cached_start(pivoted_qr, WEIGHTS, folder, rank=2)
    monkeypatch.undo()
    [told] = [str(warning.message) for warning in seen]
    assert str(folder) in told
    assert reason in told
    assert all(map(same, results, pivoted_qr(WEIGHTS, rank=2)))
    assert [*tmp_path.iterdir()] == []
    cached_start(pivoted_qr, WEIGHTS, folder, rank=2)
    assert len([*folder.iterdir()]) == len(WEIGHTS)


def test_an_entry_that_may_not_be_read_is_computed(tmp_path: Path) -> None:
    """A folder in its place is what also root may not read."""
    cached_start(pivoted_qr, WEIGHTS[:1], tmp_path, rank=2)
    [file] = tmp_path.iterdir()
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match=str(tmp_path)):
        [again] = cached_start(pivoted_qr, WEIGHTS[:1], tmp_path, rank=2)
    assert same(again, pivoted_qr(WEIGHTS[0], rank=2))


@pytest.mark.parametrize("inside", [False, True])
def test_a_cache_that_is_a_file_is_refused_before_anything_is_computed(
    inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(cache, "start_some", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match=r"cache must be a folder, got .*file"):
        cached_start(pivoted_qr, WEIGHTS, file / "in" if inside else file, rank=2)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    told = []
    with warnings.catch_warnings(record=True) as seen, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(files, "save_file", full)
        # Both ranks' one folder is full; then rank 1's own alone.
        results = distributed_start(pivoted_qr, WEIGHTS, cache=f"{folder}/one", rank=2)
        told.append([str(warning.message) for warning in seen])
        if rank == 0:
            patch.undo()
        own = f"{folder}/own{rank}"
        results += distributed_start(pivoted_qr, WEIGHTS, cache=own, rank=2)
        told.append([str(warning.message) for warning in seen][len(told[0]) :])
    torch.save((results, told), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_with_a_full_disk_share_their_factors_and_one_warns(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    (left, told_left), (right, told_right) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    expected = pivoted_qr(WEIGHTS, rank=2)
    for results in (left, right):
        assert all(map(same, results, [*expected, *expected]))
    assert [len(told) for told in told_left] == [1, 0]
    assert [len(told) for told in told_right] == [0, 1]
    assert f"{tmp_path}/one" in told_left[0][0]
    assert f"{tmp_path}/own1" in told_right[1][0]
    assert len([*(tmp_path / "own0").iterdir()]) == len(WEIGHTS)
