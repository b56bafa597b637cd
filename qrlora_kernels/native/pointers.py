"""Addresses of tensors: the one place that makes them.

A kernel is given an address and strides and can ask nothing more. So it is asked here whether the
elements of a tensor lie in its memory as its shape and strides say. What can be brought there is
copied: a negation still to be done, a layout that no kernel reads. The rest is refused with a
``TypeError``: wrappers of other tensors, layouts that are not strided, memory that was freed or is
on another device. csrc/python/tensors.cpp asks the same of the tensors that it reads for itself.

``matrix``, ``rows`` and ``dense`` return what has to be held until the kernel returns, since it may
be a copy, and what the kernel is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import CORE

CPU = torch.device("cpu")


def _tells_nothing(*operands: Any) -> bool:
    return False


# Whether all operands are plain tensors or None, in one native call; without one, each is examined.
are_plain = getattr(CORE, "are_plain", _tells_nothing)


def matrix(
    t: Tensor, name: str = "an operand", device: torch.device = CPU
) -> tuple[Tensor, tuple[int, int, int]]:
    """``t`` [N, K] with one of its dimensions contiguous: its address, row and column stride."""
    if not are_plain(t) or t.device != device:
        t = checked(t, name, device)
    row, column = t.stride()
    if (row != 1 and column != 1) or row == 0 or column == 0:
        t = _copy(t)
        row, column = t.stride()
    return t, (t.data_ptr(), row, column)


def rows(
    t: Tensor, name: str = "an operand", device: torch.device = CPU
) -> tuple[Tensor, tuple[int, int, int]]:
    """``t`` [M, K] with contiguous rows: its address, row stride and 1."""
    if not are_plain(t) or t.device != device:
        t = checked(t, name, device)
    row, column = t.stride()
    if column != 1 or row == 0:
        t = _copy(t)
        row, column = t.stride()
    return t, (t.data_ptr(), row, column)


def dense(*tensors: Tensor | None, device: torch.device = CPU) -> tuple[list[Any], list[int]]:
    """Tensors without gaps: their addresses; None is 0, and nothing else that has elements is."""
    if not are_plain(*tensors):
        tensors = tuple(None if t is None else checked(t) for t in tensors)
    held = [
        t if t is None or (t.device == device and t.is_contiguous()) else _gapless(t, device)
        for t in tensors
    ]
    return held, [0 if t is None else t.data_ptr() for t in held]


def out(*results: Tensor | None, device: torch.device = CPU) -> list[int]:
    """The addresses of results without gaps, which the caller made and holds; None is 0."""
    if not are_plain(*results) and any(t is not None and checked(t) is not t for t in results):
        raise TypeError("a result must be written as it lies, got one that is still to be negated")
    fit = [t for t in results if t is None or (t.device == device and t.is_contiguous())]
    if len(fit) < len(results):
        raise ValueError(f"a result must be contiguous and on {device}")
    return [0 if t is None else t.data_ptr() for t in results]


def address(t: Tensor, name: str = "an operand", device: torch.device = CPU) -> int:
    """The address of a tensor that the caller holds and whose strides the kernel is told."""
    if checked(t, name, device) is not t:
        raise TypeError(f"{name} must be taken as it lies, got one that is still to be negated")
    return t.data_ptr()


def is_aligned(t: Tensor, size: int) -> bool:
    """Whether ``t`` begins at a multiple of ``size`` bytes."""
    return t.data_ptr() % size == 0


def checked(t: Tensor, name: str = "an operand", device: torch.device | None = None) -> Tensor:
    """``t``, or a copy of what it stands for: strided, every element in memory of its own.

    Raises
    ------
    TypeError
        There is no such memory, or it is not on ``device``; the message names the operand.
    """
    if not are_plain(t):
        t = _examined(t, name)
    if device is not None and t.device != device:
        raise TypeError(f"{name} must be on {device}, got a tensor on {t.device}")
    return t


def is_wrapper(t: Tensor) -> bool:
    """Whether PyTorch's operations on ``t`` are answered by its class or by a transform.

    Such a tensor may have no memory, and what memory it has need not be what it stands for.
    """
    functorch = torch._C._functorch
    return (
        type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__
        or functorch.is_functorch_wrapped_tensor(t)
        or functorch.is_legacy_batchedtensor(t)
    )


def _gapless(t: Tensor, device: torch.device) -> Tensor:
    checked(t, device=device)
    return _copy(t)


def _copy(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _examined(t: Tensor, name: str) -> Tensor:
    """:func:`checked` of what may be anything."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if is_wrapper(t):
        raise TypeError(
            f"{name} must be a plain tensor, got {type(t).__name__}, which stands for something "
            "else (a quantised, masked, distributed, fake or batched tensor)"
        )
    if t.layout is not torch.strided or t.is_nested:
        kind = "a nested tensor" if t.is_nested else f"one of layout {t.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    if t.is_meta:
        raise TypeError(f"{name} must hold data, got a tensor on the meta device")
    if t._is_zerotensor():
        return t.clone()
    resolved = t.resolve_conj().resolve_neg()
    if t.device.type in ("cpu", "cuda"):  # elsewhere a tensor may have no storage to ask
        _check_memory(resolved, name)
    return resolved


def _check_memory(t: Tensor, name: str) -> None:
    if t.numel() == 0:
        return
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    needed = (t.storage_offset() + last + 1) * t.element_size()
    there = t.untyped_storage().nbytes()
    if there < needed or t.data_ptr() == 0:
        raise TypeError(
            f"{name} must hold data, got a tensor over {needed} bytes of a storage that has "
            f"{there if t.data_ptr() else 'none'}: its memory was freed or is somewhere else"
        )
