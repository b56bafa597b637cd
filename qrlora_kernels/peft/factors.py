"""The frozen factors of a layer's adapters: one set for each distinct start, whoever uses it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..adapters import AnyAdapter, State, Tensors
from ..adapters.low_rank import LowRank


class Start(nn.Module):
    """The factors of one start, as buffers that are in no state dict."""

    def __init__(self, factors: Tensors) -> None:
        super().__init__()
        for name, tensor in factors.items():
            self.register_buffer(name, tensor, persistent=False)

    def factors(self) -> State:
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}


class Factors(nn.Module):
    """Starts by a number, and which adapter uses which.

    A module of our own: PEFT casts what it knows to be an adapter's to other dtypes. Adapters whose
    factors have the same bits share them, and so do those of a smaller rank where theirs are the
    first rows and columns of a larger one's, as a greedy QR's are.
    """

    def __init__(self, adapter: AnyAdapter) -> None:
        super().__init__()
        self.adapter = adapter
        self.used: dict[str, str] = {}  # adapter's name -> key of its start

    def __contains__(self, name: str) -> bool:
        return name in self.used

    def __getitem__(self, name: str) -> Start:
        start = self._modules[self.used[name]]
        assert isinstance(start, Start)
        return start

    def __delitem__(self, name: str) -> None:
        key = self.used.pop(name)
        if key not in self.used.values():
            del self._modules[key]

    def keys(self) -> Iterator[str]:
        return iter(self.used)

    def put(self, name: str, factors: Tensors) -> None:
        """Let the adapter called ``name`` use ``factors``, shared where they can be."""
        if name in self:
            del self[name]
        for key, start in self._modules.items():
            assert isinstance(start, Start)
            if self._holds(start.factors(), factors):
                self.used[name] = key
                return
        smaller = [k for k, s in self._modules.items() if self._holds(factors, s.factors())]  # type: ignore[union-attr,operator]
        fresh = str(1 + max(map(int, self._modules), default=0))
        self.add_module(fresh, Start(factors))
        self.used[name] = fresh
        for other, key in self.used.items():
            if key in smaller:
                self.used[other] = fresh
        for key in smaller:
            del self._modules[key]

    def _holds(self, large: Tensors, small: Tensors) -> bool:
        """Whether ``small`` is ``large`` or, in a low-rank adapter, its first directions."""
        if large.keys() != small.keys():
            return False
        if issubclass(self.adapter, LowRank):
            large = {n: prefix(t, small[n].shape) for n, t in large.items()}
        return all(_equal(large[name], small[name]) for name in large)


def prefix(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The first rows and columns of ``tensor`` that ``shape`` asks for."""
    for dim, size in enumerate(shape):
        if size < tensor.shape[dim]:
            tensor = tensor.narrow(dim, 0, size)
    return tensor


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(one, other)
