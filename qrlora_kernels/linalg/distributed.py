"""Starts shared over ranks: each factorises its share and all end with the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import named_matrices
from .records import Start, check_start, from_record, to_record


def distributed_start(
    start: Start,
    weights: Sequence[Tensor],
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> list[Any]:
    """``start(weights, **options)`` shared over the ranks of a process group.

    Every rank calls it with the same weights and options. A matrix is factorised by one rank, which
    sends the result to the others, so that different machines do not start from different bits. An
    error on one rank is raised on all.

    Parameters
    ----------
    start : pivoted_qr, truncated_svd or kron_factors
    weights : sequence of Tensor [N, K]
        On devices that the group's backend can send from.
    group : ProcessGroup, optional
        The default group if None.
    **options
        As ``start`` takes them.

    Returns
    -------
    list
        The results in the order of ``weights``, on the devices of the weights.

    Raises
    ------
    RuntimeError
        ``torch.distributed`` is not initialised.
    TypeError, ValueError
        As ``start`` raises them, with the matrix's index in this rank's share.
    """
    check_start(start)
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("distributed_start needs torch.distributed.init_process_group first")
    if isinstance(weights, Tensor):
        raise TypeError("weights must be a list of tensors, got a Tensor")
    named_matrices(weights)
    rank = dist.get_rank(group)
    owners = share_out([weight.shape for weight in weights], dist.get_world_size(group))
    mine = [i for i, owner in enumerate(owners) if owner == rank]
    made: dict[int, Any] = {}
    error: Exception | None = None
    try:
        made = dict(zip(mine, start([weights[i] for i in mine], **options), strict=True))
    except Exception as caught:  # sent to all ranks, or they would wait for the results
        error = caught
    _raise_together(error, group)
    return [
        _share(start, made.get(i), owner, weight.device, group)
        for i, (owner, weight) in enumerate(zip(owners, weights, strict=True))
    ]


def share_out(shapes: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """Owner of each matrix: the largest first, each to the rank with the least to do so far."""
    load = [0] * ranks
    owners = [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: (-shapes[i][0] * shapes[i][1], i)):
        owners[i] = load.index(min(load))
        load[owners[i]] += shapes[i][0] * shapes[i][1]
    return owners


def _raise_together(error: Exception | None, group: dist.ProcessGroup | None) -> None:
    errors: list[Exception | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    for rank, other in enumerate(errors):
        if other is not None:
            if error is not None:
                raise error
            raise type(other)(f"on rank {rank}: {other}")


def _share(
    start: Start,
    result: Any,
    owner: int,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> Any:
    """``result`` of the owning rank, on every rank."""
    tensors: dict[str, Tensor] = {}
    header: list[Any] = [None]
    if result is not None:
        tensors, values = to_record(result)
        header = [({n: (t.shape, t.dtype) for n, t in tensors.items()}, values)]
    source = owner if group is None else dist.get_global_rank(group, owner)
    dist.broadcast_object_list(header, src=source, group=group, device=device)
    layout, values = header[0]
    received = {}
    for name, (shape, dtype) in layout.items():
        buffer = tensors[name] if tensors else torch.empty(shape, dtype=dtype, device=device)
        received[name] = buffer.contiguous()
        dist.broadcast(received[name], src=source, group=group)
    return from_record(start, received, values)
