"""Tensors that a layer computes from its frozen ones and keeps: never saved, never copied."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

Source = Tensor | float


class Derived:
    """What one layer computed, each under a name, with the state that its sources were in.

    A value whose sources were written to, replaced or converted since is computed anew. A write
    through ``weight.data`` (``weight.data.add_(1)``) goes by PyTorch's count of writes, and so goes
    unseen: :func:`qrlora_kernels.refresh` and :meth:`drop` help there.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def get(self, name: str, build: Callable[..., Tensor], *sources: Source) -> Tensor:
        """``build(*sources)``, kept until a source changes.

        Parameters
        ----------
        name : str
        build : callable
            Runs without gradients. Its value depends on ``sources`` alone.
        sources : Tensor or float
            Stored tensors, not views made for the call, for which :func:`applies`; and numbers.
        """
        account = tuple(map(_account, sources))
        kept = self._kept.get(name)
        if kept is not None and kept.account == account and kept.is_of_living_sources():
            return kept.value
        # A tensor that was made in inference mode takes part in no backward.
        with torch.inference_mode(False), torch.no_grad():
            value = build(*sources)
        tensors = [s for s in sources if isinstance(s, Tensor)]
        self._kept[name] = _Kept(
            account,
            tuple(weakref.ref(t) for t in tensors),
            tuple(StorageWeakRef(t.untyped_storage()) for t in tensors),
            value,
        )
        return value

    def drop(self, *names: str) -> None:
        """Forget the named values, all if none is named."""
        for name in names or [*self._kept]:
            self._kept.pop(name, None)

    def nbytes(self) -> dict[str, int]:
        """What each value takes in memory."""
        values = {name: kept.value for name, kept in [*self._kept.items()]}
        return {name: value.numel() * value.element_size() for name, value in values.items()}

    def __deepcopy__(self, memo: Any) -> Derived:
        return Derived()

    def __reduce__(self) -> Any:
        return Derived, ()


class _Kept(NamedTuple):
    account: tuple[Any, ...]
    # The account knows tensors and memory by addresses, which may be others' once these are gone;
    # an address of memory that is only referred to is not given away.
    tensors: tuple[weakref.ref[Tensor], ...]
    storages: tuple[StorageWeakRef, ...]
    value: Tensor

    def is_of_living_sources(self) -> bool:
        return None not in [tensor() for tensor in self.tensors]


def _account(source: Source) -> Any:
    """What is another after every change of a tensor; of a number the number."""
    if not isinstance(source, Tensor):
        return source
    return (
        id(source),
        source._version,
        source.untyped_storage()._cdata,  # ``tensor.data = other`` counts as no write
        source.storage_offset(),
        source.stride(),
        source.dtype,
        source.device,
    )


def applies(*sources: Tensor) -> bool:
    """Whether a call may use what was derived from ``sources``: in plain eager mode alone.

    A trace records operators of the tensors themselves, a transform or a mode sees other tensors
    than the stored ones, and a source that asks for a gradient must take part in the call.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return all(_is_plain(source) for source in sources)


def _is_plain(source: Tensor) -> bool:
    if type(source) not in (Tensor, nn.Parameter) or source.requires_grad or source.is_meta:
        return False
    return not source.is_inference()  # which counts no writes
