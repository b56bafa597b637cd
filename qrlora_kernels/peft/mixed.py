"""Batches whose rows have adapters of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.functional import pad

from .. import functional
from ..adapters import State
from ..adapters.low_rank import LowRank
from ..reference import accumulation_dtype

if TYPE_CHECKING:
    from .layer import _Linear

BASE = "__base__"  # PEFT's word for no adapter


class Rows(list[str]):
    """The names of a batch's rows, with what all layers need of them."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        super().__init__(names)
        self.distinct = list(dict.fromkeys(names))
        place = {name: at for at, name in enumerate(self.distinct)}
        self.places = torch.tensor([place[name] for name in names], device=device)


def rows_of(names: Sequence[str], device: torch.device) -> Rows:
    if isinstance(names, Rows) and names.places.device == device:
        return names
    return Rows(names, device)


def check(layer: _Linear, x: Tensor, names: Sequence[str]) -> None:
    """Raise, in PEFT's words, where ``names`` cannot be those of ``x``'s rows."""
    if len(x) != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {len(x)} respectively."
        )
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call "
            "`unmerge_adapter` first."
        )


def forward(layer: _Linear, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
    """y [B, ..., N] where row b has the update of the adapter ``names[b]``."""
    rows = rows_of(names, x.device)
    here = [name for name in rows.distinct if layer.has(name)]
    for name in here:
        layer.compare(name)
    if not here:
        return layer.base(x, *args, **kwargs)
    fused = not (args or kwargs) and layer.is_plain(x)
    share = len({layer.factors_of.used[name] for name in here}) == 1
    low_rank = issubclass(layer.adapter, LowRank)
    if fused and share and low_rank:
        return _at_once(layer, x, rows, here[0])
    by_row = share and not low_rank and layer.adapter.fuses(layer.options[here[0]])
    update = _by_row(layer, x, rows, here[0]) if by_row else _by_groups(layer, x, rows, here)
    if fused:
        return layer.through(x, lambda x, w, b: functional.linear_add(x, w, b, update.to(x.dtype)))
    result = layer.base_layer(x, *args, **kwargs)
    return result + update.to(result.dtype)


def _at_once(layer: _Linear, x: Tensor, rows: Rows, one: str) -> Tensor:
    """One call over the factors of ``one``, which all of them share."""
    ((key, gates),) = stacked(layer, rows).items()
    gates = gates * scalings(layer, rows, gates).reshape(-1, *[1] * (gates.dim() - 1))
    factors, options = layer.factors_of[one].factors(), layer.options[one]

    def product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        own = layer._of_product({key: gates}, x)
        of_rows = layer._of_product(factors, x), own, rows.places, options, 1.0
        return layer.adapter.fused_by_row(x, matrix, bias, *of_rows)

    return layer.through(x, product)


def _by_row(layer: _Linear, x: Tensor, rows: Rows, one: str) -> Tensor:
    """The update [B, ..., N] of a Kronecker product, with the trainables of each row beside it."""
    scaling = scalings(layer, rows, x)[rows.places].reshape(-1, *[1] * (x.dim() - 1))
    x = x.to(scaling.dtype)
    tensors = layer._of_product(layer.tensors(one), x)
    own = layer._of_product(stacked(layer, rows), x)
    of_rows = tensors, own, rows.places, layer.options[one], 1.0
    return scaling * layer.adapter.update_by_row(x, *of_rows)


def stacked(layer: _Linear, rows: Rows) -> State:
    """Each trainable of the distinct names, [A, ...].

    Of the largest rank among them, padded with zeros; zeros for the base and for an adapter that is
    not on this layer.
    """
    found = {}
    trained = {name: layer.trainables(name) for name in rows.distinct if layer.has(name)}
    for key in layer.adapter.trainables:
        own = [trained[name][key] if name in trained else None for name in rows.distinct]
        largest = max((tensor for tensor in own if tensor is not None), key=len)
        zeros = torch.zeros_like(largest)
        wide = [zeros if tensor is None else _padded(tensor, largest) for tensor in own]
        found[key] = torch.stack(wide)
    return found


def scalings(layer: _Linear, rows: Rows, like: Tensor) -> Tensor:
    """s of the distinct names [A], 0 where a row has no update."""
    found = [layer.scaling.get(name, 0.0) for name in rows.distinct]
    return torch.tensor(found, dtype=accumulation_dtype(like.dtype), device=like.device)


def _padded(gate: Tensor, like: Tensor) -> Tensor:
    missing = len(like) - len(gate)
    return pad(gate, (0, missing) * gate.dim()) if missing else gate


def _by_groups(layer: _Linear, x: Tensor, rows: Rows, here: list[str]) -> Tensor:
    """The update of each group of rows with the same adapter, zero for the base, [B, ..., N]."""
    total = x.new_zeros(*x.shape[:-1], layer.out_features)
    for at, name in enumerate(rows.distinct):
        if name in here:
            mine = (rows.places == at).nonzero().flatten()
            total[mine] = layer.update(x[mine], name).to(total.dtype)
    return total


# --- the model


@contextmanager
def named_rows(
    model: nn.Module,
    layers: type[nn.Module],
    known: Mapping[str, Any],
    encoder: nn.Module | None,
    names: Any,
    num_beams: Any,
) -> Iterator[None]:
    """Inside, every layer of ``model`` is told the adapter of each row.

    Parameters
    ----------
    model : nn.Module
    layers : type
        The class of the adapted layers.
    known : mapping
        Has a key for each adapter.
    encoder : nn.Module, optional
        Of an encoder-decoder model, whose rows beam search does not repeat.
    names : list of str
    num_beams : int, optional
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
    for at, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"adapter_names must be a list of str, got {name!r} for row {at}")
    unknown = sorted({name for name in names if name != BASE and name not in known})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    device = next(model.parameters()).device
    repeated = Rows([name for name in names for _ in range(beams)], device)
    plain = Rows(names, device) if encoder is not None and beams > 1 else repeated
    inside = {id(module) for module in encoder.modules()} if encoder is not None else set()
    told = (layers, AuxiliaryTrainingWrapper)
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, told):
                rows = plain if id(module) in inside else repeated
                hook = partial(_tell, adapter_names=rows)
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _tell(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: Rows
) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"adapter_names": adapter_names}
