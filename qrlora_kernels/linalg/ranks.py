"""What the ranks of a process group do together: gather, send, agree, and fail together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..fingerprint import quick_digest
from .checks import Weights, named_matrices
from .parallel import in_threads

T = TypeVar("T")
Parts = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and plain values by name
# The facts, and the name, the layout and the digest of each weight.
Claim = tuple[dict[str, str], list[tuple[str, str, str]]]

_SAME_KIND: dict[str, type[Exception]] = {"ValueError": ValueError, "TypeError": TypeError}


def several_ranks() -> bool:
    """``torch.distributed`` is initialised with more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Ranks:
    """The ranks of ``group``, or of the default group; every method is called by all of them."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def together(self, task: Callable[[], T]) -> T:
        """This rank's ``task()``, of which nothing is sent; errors as in :meth:`gather`."""
        own: list[T] = []
        self.gather(lambda: own.append(task()))
        return own[0]

    def gather(self, task: Callable[[], T]) -> list[T]:
        """``task()`` of every rank, in their order.

        An error on one rank is raised on all, or they would wait.
        """
        error: Exception | None = None
        sent: tuple[T | None, str, str]  # what is shared, or the kind and message of an error
        try:
            sent = (task(), "", "")
        except Exception as caught:
            error = caught
            sent = (None, type(caught).__name__, str(caught))
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, sent, group=self.group)
        if error is not None:
            raise error
        for rank, (_, kind, message) in enumerate(every):
            if kind in _SAME_KIND:
                raise _SAME_KIND[kind](f"on rank {rank}: {message}")
            if kind:
                raise RuntimeError(f"on rank {rank}: {kind}: {message}")
        return [value for value, _, _ in every]

    def send(self, parts: Parts | None, source: int, device: torch.device) -> Parts:
        """``parts`` of rank ``source``, on ``device`` of every rank; others' are not looked at."""
        tensors, values = parts if parts is not None and self.rank == source else ({}, {})
        layout = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        header: list[Any] = [(layout, values)]
        root = source if self.group is None else dist.get_global_rank(self.group, source)
        wire = _wire_device(device, dist.get_backend_config(self.group))
        dist.broadcast_object_list(header, src=root, group=self.group, device=wire)
        layout, values = header[0]
        received = {}
        for name, (shape, dtype) in layout.items():
            own = tensors.get(name)
            whole = torch.empty(shape, dtype=dtype, device=wire) if own is None else own.to(wire)
            whole = whole.contiguous()
            dist.broadcast(whole, src=root, group=self.group)
            received[name] = whole.to(device)
        return received, values


def require_agreement(ranks: Ranks, weights: Weights, facts: Mapping[str, object]) -> None:
    """Return where all ranks call with the same ``facts`` and weights that are equal, bit for bit.

    Raises
    ------
    TypeError, ValueError
        On all ranks: a rank's weights are no matrices, or ranks differ; the message names the fact
        or the weight and two ranks.
    """

    def claim() -> Claim:
        named = named_matrices(weights)
        layouts = [f"{tuple(weight.shape)} of {weight.dtype}" for weight in named.values()]
        digests = in_threads(quick_digest, list(named.values()))
        told = {name: str(value) for name, value in facts.items()}
        return told, list(zip(named, layouts, digests, strict=True))

    first, *others = ranks.gather(claim)
    for rank, other in enumerate(others, start=1):
        _compare(first, other, rank)


def _compare(first: Claim, other: Claim, rank: int) -> None:
    (facts, weights), (other_facts, other_weights) = first, other
    for name in sorted(facts | other_facts):
        _require_same(name, facts.get(name, "none"), other_facts.get(name, "none"), rank)
    _require_same("the number of weights", str(len(weights)), str(len(other_weights)), rank)
    for (name, *own), (_, *others) in zip(weights, other_weights, strict=True):
        _require_same(f"the shape and dtype of {name}", own[0], others[0], rank)
        if own[1] != others[1]:
            raise ValueError(
                f"{name} must be equal on all ranks that share a start, but rank {rank} holds "
                "other values than rank 0; ranks with models of their own start alone (adapt's "
                "distributed=False)"
            )


def _require_same(name: str, first: str, other: str, rank: int) -> None:
    if first != other:
        raise ValueError(
            f"{name} must be the same on all ranks, got {first} on rank 0 and {other} on rank "
            f"{rank}"
        )


def _wire_device(device: torch.device, config: str) -> torch.device:
    """Where ``device``'s tensors can be sent from, for a backend config like "cuda:nccl"."""
    types = [part.partition(":")[0] for part in config.split(",")]
    if device.type in types:
        return device
    if "cuda" in types:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(types[0])
