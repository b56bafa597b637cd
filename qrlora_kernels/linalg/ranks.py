"""What the ranks of a process group do together: gather, send, and fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Parts = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and plain values by name

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
        """This rank's ``task()``; an error on one rank is raised on all, or they would wait."""
        result, _ = self._run(task, lambda _: None)
        return result

    def gather(self, task: Callable[[], T]) -> list[T]:
        """``task()`` of every rank, in their order; errors as in :meth:`together`."""
        _, gathered = self._run(task, lambda result: result)
        return gathered

    def _run(self, task: Callable[[], T], share: Callable[[T], Any]) -> tuple[T, list[Any]]:
        error: Exception | None = None
        sent: tuple[Any, str, str]  # what is shared, or the kind and message of an error
        try:
            result = task()
            sent = (share(result), "", "")
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
        return result, [value for value, _, _ in every]

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


def _wire_device(device: torch.device, config: str) -> torch.device:
    """Where ``device``'s tensors can be sent from, for a backend config like "cuda:nccl"."""
    types = [part.partition(":")[0] for part in config.split(",")]
    if device.type in types:
        return device
    if "cuda" in types:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(types[0])
