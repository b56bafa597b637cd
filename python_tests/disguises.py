"""Tensors that are not what a kernel would read at their address, for tests of every operand.

A disguise takes a plain tensor and returns what is handed over in its place: something that stands
for the same values, or for others that are known; something whose class or layout answers PyTorch's
operations itself; or something that has no elements in memory and has to be refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

Disguise = Callable[[Tensor], Tensor]
FAR = 2**40  # elements between two neighbours of which there is only one


class Subclass(torch.Tensor):
    """Without a behaviour of its own."""


class Wrapper(torch.Tensor):
    """A quantised weight, say: no memory, and only the operations that its author thought of."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].inner)
        raise NotImplementedError(f"{cls.__name__} does not know {function}")

    def __repr__(self) -> str:
        return f"Wrapper({list(self.inner.shape)})"


def _imaginary(t: Tensor) -> Tensor:
    """The imaginary part of a conjugate: a negated view of every second number."""
    pairs = torch.stack([torch.zeros_like(t), -t], -1)
    wide = pairs.dtype not in (torch.float32, torch.float64)
    # There is no complex type over bf16, and none over fp16 that can be conjugated and copied.
    return torch._neg_view(pairs[..., 1]) if wide else torch.view_as_complex(pairs).conj().imag


def _every_second(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]


def _apart(t: Tensor) -> Tensor:
    """With room between the rows."""
    return torch.cat([t, torch.full_like(t, 7)], -1)[..., : t.shape[-1]]


def _behind(t: Tensor) -> Tensor:
    """Somewhere in a larger storage."""
    flat = torch.cat([torch.full((8,), 7).to(t), t.reshape(-1), torch.full((8,), 7).to(t)])
    return flat[8 : 8 + t.numel()].view(t.shape)


def _turned(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else _every_second(t)


def _far_apart(t: Tensor) -> Tensor:
    """Dimensions of one element with a stride beyond any memory."""
    t = t.contiguous()
    strides = [FAR if size == 1 else step for size, step in zip(t.shape, t.stride(), strict=True)]
    return t.as_strided(t.shape, strides)


def _pickled(t: Tensor) -> Tensor:
    """As ``torch.load`` makes it: negated, and no view of anything."""
    return torch._neg_view(-t).detach()


def _freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def _freed_behind(t: Tensor) -> Tensor:
    """One of many views of a storage that was freed: its address is small, not null."""
    t = _behind(t)
    t.untyped_storage().resize_(0)
    return t


def _cut(t: Tensor) -> Tensor:
    t = t.clone(memory_format=torch.contiguous_format)
    t.untyped_storage().resize_(max(0, t.nbytes - t.element_size()))
    return t


def _masked(t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return masked_tensor(t.clone(), torch.ones_like(t, dtype=torch.bool))


# The same values.
SAME: dict[str, Disguise] = {
    "plain": lambda t: t,
    "subclass": lambda t: t.as_subclass(Subclass),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "negated": lambda t: torch._neg_view(-t),
    "negated, pickled": _pickled,
    "imaginary": _imaginary,
    "every second": _every_second,
    "apart": _apart,
    "behind": _behind,
    "turned": _turned,
    "far apart": _far_apart,
}
# Others, which reading the tensor as PyTorch does tells.
OTHER: dict[str, Disguise] = {
    "one expanded": lambda t: t.flatten()[:1].expand(t.shape) if t.numel() else t,
    "row expanded": lambda t: t[:1].expand(t.shape) if len(t) else t,
    "column expanded": lambda t: t[..., :1].expand(t.shape) if t.shape[-1] else t,
    "overlapping": lambda t: torch.as_strided(
        torch.cat([t.flatten(), t.flatten()]), t.shape, [1] * t.dim()
    ),
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}
# Their classes, or the dispatcher, answer PyTorch's operations.
ANSWERING: dict[str, Disguise] = {
    "two": lambda t: TwoTensor(t, t.clone()),
    "wrapper": Wrapper,
    "masked": _masked,
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "functional": torch._to_functional_tensor,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "mkldnn": lambda t: t.float().contiguous().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "complex": lambda t: t.to(torch.complex64),
    "conjugated": lambda t: t.to(torch.complex64).conj(),
    "integers": lambda t: t.to(torch.int32),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "number": lambda t: 1.0,
    "one short": lambda t: t[:-1],
    "one dimension more": lambda t: t[None, None],
}
# No memory that a library product could read either.
REFUSED: dict[str, Disguise] = {"freed": _freed, "freed, behind": _freed_behind, "cut": _cut}
