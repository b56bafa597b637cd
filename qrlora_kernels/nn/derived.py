"""What a layer computes from its frozen tensors and keeps: never saved, never copied."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..modes import seen_through


class HasSize(Protocol):
    """A tensor, or what holds some."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=HasSize)


class Derived:
    """What one layer computed, each under a name, with the state that its sources were in.

    A value whose sources were written to, replaced or converted since is computed anew. A write
    through ``weight.data`` (``weight.data.add_(1)``) goes by PyTorch's count of writes, and so goes
    unseen: :func:`qrlora_kernels.refresh` and :meth:`drop` help there.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def get(self, name: str, build: Callable[..., T], *sources: Tensor) -> T | None:
        """``build(*sources)``, kept until a source changes; None where a call goes without it.

        That is outside plain eager mode (a trace records operators of the tensors themselves, a
        transform, a mode or a forward-mode derivative sees other tensors than the stored ones) and
        for a source that asks for a gradient, which takes part in the call then, or counts no
        writes.

        Parameters
        ----------
        name : str
        build : callable
            Runs without gradients. What its value depends on beside ``sources`` calls :meth:`drop`
            when it changes.
        sources : Tensor
            Stored tensors, not views made for the call.
        """
        if seen_through():
            return None
        kept = self._kept.get(name)
        if kept is not None and kept.is_of(sources):
            return kept.value  # type: ignore[return-value]  # what this build made
        if not all(map(_is_plain, sources)):
            return None
        # A tensor that was made in inference mode takes part in no backward.
        with torch.inference_mode(False), torch.no_grad():
            value = build(*sources)
        self._kept[name] = _Kept(tuple(map(_seen, sources)), value)
        return value

    def has(self, name: str) -> bool:
        """Whether a value is kept, of whichever state of its sources."""
        return name in self._kept

    def drop(self, *names: str) -> None:
        """Forget the named values, all if none is named."""
        for name in names or [*self._kept]:
            self._kept.pop(name, None)

    def nbytes(self) -> dict[str, int]:
        """What each value takes in memory."""
        return {name: kept.value.nbytes for name, kept in [*self._kept.items()]}

    def __deepcopy__(self, memo: Any) -> Derived:
        return Derived()

    def __reduce__(self) -> Any:
        return Derived, ()


def kept_bytes(model: nn.Module) -> int:
    """What all layers of ``model`` keep in memory."""
    kept = (vars(module).get("derived") for module in model.modules())
    return sum(sum(one.nbytes().values()) for one in kept if isinstance(one, Derived))


class _Seen(NamedTuple):
    """A source when its value was computed."""

    tensor: weakref.ref[Tensor]
    writes: int
    memory: Tensor  # an alias: ``tensor.data = other`` is another memory and counts as no write


class _Kept(NamedTuple):
    sources: tuple[_Seen, ...]
    value: HasSize

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        """Whether ``sources`` are the same tensors in the same state; asked at every call."""
        for seen, source in zip(self.sources, sources, strict=True):
            if seen.tensor() is not source or source._version != seen.writes:
                return False
            if source.requires_grad or source.dtype != seen.memory.dtype:
                return False
            if source.device != seen.memory.device or not source.is_set_to(seen.memory):
                return False
        return True


def _seen(source: Tensor) -> _Seen:
    return _Seen(weakref.ref(source), source._version, source.detach())


def _is_plain(source: Tensor) -> bool:
    if type(source) not in (Tensor, nn.Parameter) or source.requires_grad or source.is_meta:
        return False
    return not source.is_inference()  # which counts no writes
