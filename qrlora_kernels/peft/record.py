"""What a file knows of the base that an adapter was trained over, in a few integers a layer.

``[dtype, f₀, f₁, …]``: the dtype and fingerprint of the base weight, then what tells the factors
from others. For QR-LoRA that are its pivots and the diagonal of R, from which the very factors are
built again; else one sum over each direction, which another sign, order or rotation changes. As
int64, which no cast changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapters import AnyAdapter, Options, State, Tensors
from ..nn import base_weight
from ..reference import HALF

_HEAD = 3
_DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip  # by their place: more may join at the end


class OtherBase(ValueError):
    """The adapter was trained over another base weight."""


def head_of(stored: Tensor, base: nn.Module) -> Tensor:
    """What tells the weight ``stored``, as the layer ``base`` stores it, from others [3]."""
    print_ = bytes.fromhex(base_weight.exact_digest(base, stored))
    words = [int.from_bytes(print_[at : at + 8], "little", signed=True) for at in (0, 8)]
    return torch.tensor([_code(stored.dtype), *words], device="cpu")  # whatever the default is


def head(record: Tensor) -> Tensor:
    """The part of a record that is of the base weight."""
    return record[:_HEAD]


def record_of(adapter: AnyAdapter, base: Tensor, factors: Tensors) -> Tensor:
    """The record [3 + n] of factors that came from the weight with the head ``base``."""
    return torch.cat([base, *(_bits(tensor) for tensor in _tell(adapter, factors))])


def check(
    adapter: AnyAdapter, name: str, own: Tensor, saved: Tensor, weight: Tensor, options: Options
) -> State | None:
    """Compare what is ``saved`` with the layer's ``own`` record, of one base and rank.

    Returns
    -------
    dict of Tensor, or None
        The factors that the file was trained with, where this machine chose other pivots; None
        where the layer's own are those.

    Raises
    ------
    ValueError
        The base gives other factors here.
    """
    own, saved = own[_HEAD:], saved[_HEAD:]
    if adapter.rebuilt_from:
        (pivots, diagonal), (chosen, _) = saved.chunk(2), own.chunk(2)
        if torch.equal(pivots, chosen):
            return None  # the same factors, but for the last bits of a diagonal
        kept = {"pivots": pivots.to(weight.device), "diagonal": _floats(diagonal).to(weight.device)}
        try:
            return adapter.rebuild(weight, options, kept)
        except ValueError as error:
            raise ValueError(f"the factors of {name} cannot be built again: {error}") from None
    here, there = _floats(own), _floats(saved)
    slack = 1e-2 if weight.dtype in HALF else 1e-3
    if not torch.allclose(here, there, rtol=slack, atol=slack * float(here.abs().max())):
        raise ValueError(
            f"the factors of {name} come out otherwise here than where the adapter was trained "
            "(directions of equal strength, or another release): save it with save_factors=True"
        )
    return None


def check_base(name: str, own: Tensor, saved: Tensor) -> None:
    """Raise :class:`OtherBase` where the two records are of different base weights."""
    if len(saved) < _HEAD or not torch.equal(head(saved), head(own)):
        raise OtherBase(_other(name, own, saved))


def _other(name: str, own: Tensor, saved: Tensor) -> str:
    here, there = _dtype(own), _dtype(saved)
    if here != there:
        what = f"it had dtype {there}, and here it has {here}: load the base as that, cast later"
    else:
        what = "its shape or its numbers were others"
    return f"the adapter was trained over another base weight in {name}: {what}"


def _tell(adapter: AnyAdapter, factors: Tensors) -> list[Tensor]:
    if adapter.rebuilt_from:
        return [factors[name] for name in adapter.rebuilt_from]
    return [_sums(factors[name]) for name in adapter.factors]


def _sums(factor: Tensor) -> Tensor:
    """One weighted sum over the longer side of ``factor`` for each of its directions."""
    wide = factor.detach().double().cpu()
    along = wide if wide.shape[0] <= wide.shape[1] else wide.mT
    places = torch.arange(1, along.shape[1] + 1, dtype=torch.float64, device="cpu")
    return along @ torch.cos(places)


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double().view(torch.int64) if tensor.is_floating_point() else tensor.long()


def _floats(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.float64)


def _code(dtype: torch.dtype) -> int:
    return _DTYPES.index(dtype) if dtype in _DTYPES else -1


def _dtype(record: Tensor) -> str:
    code = int(record[0]) if len(record) else -1
    return str(_DTYPES[code]).removeprefix("torch.") if 0 <= code < len(_DTYPES) else "another one"
