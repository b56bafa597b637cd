"""The numbers of one adapter as a row of a table: which columns belong to which tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..adapters import State
from ..model.manifest import all_finite
from ..model.names import modules, parameters, under
from ..nn import AdapterLinear
from ..nn.per_row import ByRow, listen

HALF_ROUNDING = 0.02  # of bfloat16, with room; factors of another start differ by about 1


class Place(NamedTuple):
    """One tensor of an adapter, and the columns that it has."""

    module: nn.Module
    key: str
    shape: torch.Size
    dtype: torch.dtype


class Layout:
    """What trains in the adapted layers of a model and in its heads, one after the other.

    Attributes
    ----------
    places : dict of Place
        By the full names of the tensors, as a state has them ("encoder.query.lam").
    layers : dict of ByRow
        The adapted layers by name.
    heads : dict of nn.Linear
    columns : dict of slice
        Those of each tensor, by its full name.
    width : int
        How many numbers an adapter has.
    dtype : torch.dtype
        The widest of what trains.
    """

    def __init__(self, model: nn.Module, heads: tuple[str, ...] | None) -> None:
        here = modules(model)
        self.layers = _once((n, m) for n, m in here.items() if isinstance(m, ByRow))
        if not self.layers:
            raise ValueError("model must hold adapted layers, got none: call adapt() first")
        self.heads = _heads(model, here, self.layers, heads)
        self.places: dict[str, Place] = {}
        for name, layer in self.layers.items():
            layer.check_by_row(name)
            self._add(name, here[name], layer.trained_now())
        self._parents = {n.rpartition(".")[0]: here[n.rpartition(".")[0]] for n in self.heads}
        self._factors = {name: layer.frozen_now() for name, layer in self.layers.items()}
        for name, head in self.heads.items():
            self._add(name, head, held_by(head))
            listen(head)
        ends = list(accumulate(place.shape.numel() for place in self.places.values()))
        self.columns = {
            name: slice(end - place.shape.numel(), end)
            for (name, place), end in zip(self.places.items(), ends, strict=True)
        }
        self.widths = [place.shape.numel() for place in self.places.values()]
        self.width = sum(self.widths)
        self.dtype = torch.float64 if self._has(torch.float64) else torch.float32

    def _add(self, name: str, module: nn.Module, held: State) -> None:
        for key, tensor in held.items():
            self.places[f"{name}.{key}"] = Place(module, key, tensor.shape, tensor.dtype)

    def _has(self, dtype: torch.dtype) -> bool:
        return any(place.dtype == dtype for place in self.places.values())

    @property
    def modules(self) -> list[nn.Module]:
        """Whoever asks for its rows."""
        return list(dict.fromkeys(place.module for place in self.places.values()))

    def check(self) -> None:
        """Raise if the model is no longer what the table was made for."""
        for name, layer in self.layers.items():
            layer.check_by_row(name)
            for key, tensor in layer.trained_now().items():
                place = self.places[f"{name}.{key}"]
                if (tensor.shape, tensor.dtype) != (place.shape, place.dtype):
                    raise ValueError(
                        f"{name}.{key} must have the shape and dtype that it had when the bank was "
                        f"made, {list(place.shape)} {place.dtype}, got {list(tensor.shape)} "
                        f"{tensor.dtype}: make another bank"
                    )
            now = layer.frozen_now()
            if other := _others(self._factors[name], now):
                raise ValueError(
                    f"{name} must have the factors that it had when the bank was made, got another "
                    f"{other[0]}: its adapters do not belong to these, make another bank"
                )
            self._factors[name] = now
        for name, head in self.heads.items():
            parent, _, key = name.rpartition(".")
            now_there = self._parents[parent]._modules.get(key)
            if now_there is None or all(module is not head for module in now_there.modules()):
                raise ValueError(
                    f"{name} must be the layer that it was when the bank was made, got another: "
                    "make another bank"
                )

    # --- rows

    def begin(self) -> Tensor:
        """[P]: an adapter at its start, with the heads of the model as they are now."""
        return self._row(lambda layer: layer.begin())

    def silent(self) -> Tensor:
        """[P]: the base, with the heads of the model as they are now."""
        return self._row(lambda layer: layer.silent())

    def trained(self) -> list[Tensor]:
        """The parameters of the model that are in these places."""
        return self._of_all(lambda layer: layer.trained_now())

    @torch.no_grad()
    def _row(self, made: Callable[[ByRow], State]) -> Tensor:
        pieces = [tensor.reshape(-1) for tensor in self._of_all(made)]
        device = pieces[0].device
        return torch.cat([piece.to(device, self.dtype) for piece in pieces])

    def _of_all(self, made: Callable[[ByRow], State]) -> list[Tensor]:
        """What is ``made`` of each layer, and what the heads have, in the order of the places."""
        states = [made(layer) for layer in self.layers.values()]
        states += [held_by(head) for head in self.heads.values()]
        return [tensor for state in states for tensor in state.values()]

    def row(self, state: Mapping[str, Tensor]) -> Tensor:
        """[P] of a ``state``, each tensor of it checked."""
        self._check_names(state)
        pieces = []
        for name, place in self.places.items():
            tensor = state[name]
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                found = getattr(tensor, "dtype", type(tensor).__name__)
                raise TypeError(f"state must hold a floating tensor as {name}, got {found}")
            if tensor.shape != place.shape:
                raise ValueError(
                    f"state must hold {name} with shape {list(place.shape)}, got "
                    f"{list(tensor.shape)}"
                )
            pieces.append(tensor.detach().reshape(-1).to("cpu", self.dtype))
        row = torch.cat(pieces)
        if not all_finite(row):
            bad = [n for n, piece in zip(self.places, pieces, strict=True) if not all_finite(piece)]
            raise ValueError(f"state must hold finite numbers, got others in {', '.join(bad)}")
        return row

    def _check_names(self, state: Mapping[str, Tensor]) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dict of tensors, got {type(state).__name__}")
        if state.keys() != self.places.keys():
            lacks, stray = self.places.keys() - state.keys(), state.keys() - self.places.keys()
            raise ValueError(
                "state must hold what trains in each layer of the bank; it "
                f"lacks {sorted(lacks)[:3] or 'none'} and has beside them {sorted(stray)[:3]}"
            )

    def state(self, row: Tensor, dtype: torch.dtype | None = None) -> State:
        """The tensors of one row [P] by their full names, copies in ``dtype`` or their own."""
        pieces = row.detach().split(self.widths)
        return {
            name: piece.reshape(place.shape).to(dtype or place.dtype, copy=True)
            for (name, place), piece in zip(self.places.items(), pieces, strict=True)
        }

    def by_module(self, rows: Tensor) -> dict[nn.Module, State]:
        """The tensors [A, ...] of each module from rows [A, P]; gradients go back through it."""
        pieces = zip(self.places.values(), rows.split(self.widths, 1), strict=True)
        own = [piece.reshape(len(rows), *place.shape).to(place.dtype) for place, piece in pieces]
        return by_module(self.places, own)


def by_module(places: Mapping[str, Place], tensors: Iterable[Tensor]) -> dict[nn.Module, State]:
    """One tensor for each of ``places``, by whom it belongs to and its key there."""
    found: dict[nn.Module, State] = {}
    for place, tensor in zip(places.values(), tensors, strict=True):
        found.setdefault(place.module, {})[place.key] = tensor
    return found


def held_by(head: nn.Module) -> State:
    """The weight and the bias, if any, of a plain linear layer."""
    return dict(head.named_parameters(recurse=False))


def _others(before: State, now: State) -> list[str]:
    """The factors that are other numbers now, more than a cast to half precision makes them."""
    return [key for key in before if not _alike(before[key], now[key])]


def _alike(before: Tensor, now: Tensor) -> bool:
    if before.shape != now.shape or before.is_meta or now.is_meta:
        return before.shape == now.shape
    if before is now:
        return True
    if not before.is_floating_point():
        return torch.equal(before.to(now.device), now)
    old, new = before.to(now.device, torch.float64), now.double()
    return bool((new - old).norm() <= HALF_ROUNDING * old.norm())


def _once(named: Iterator[tuple[str, ByRow]]) -> dict[str, ByRow]:
    """Each layer under the first of its names."""
    found: dict[int, tuple[str, ByRow]] = {}
    for name, layer in named:
        found.setdefault(id(layer), (name, layer))
    return dict(found.values())


def _heads(
    model: nn.Module,
    here: dict[str, nn.Module],
    layers: dict[str, ByRow],
    named: tuple[str, ...] | None,
) -> dict[str, nn.Linear]:
    """The linear layers that each adapter has for itself: those ``named``, or all that train."""
    found = {n: m for n, m in here.items() if isinstance(m, nn.Linear) and _plain(m)}
    own = {id(p) for layer in layers.values() for p in layer.trained_now().values()}
    if named is not None:
        for top in named:
            if not any(under(name, (top,)) for name in found):
                raise ValueError(f"heads must name linear layers of the model, got {top!r}")
        heads = {n: m for n, m in found.items() if under(n, named)}
    else:
        heads = {
            n: m for n, m in found.items() if any(p.requires_grad for p in m.parameters(False))
        }
    free = {n: p for n, p in parameters(model).items() if p.requires_grad and id(p) not in own}
    stray = [n for n in free if n.rpartition(".")[0] not in heads]
    if stray:
        raise ValueError(
            "what trains beside the adapters must be in linear layers, of which each adapter has "
            f"its own; freeze it or name heads, got {', '.join(stray[:3])}"
        )
    return heads


def _plain(module: nn.Linear) -> bool:
    """Whether it is called: attention of PyTorch reads the weight of its own alone."""
    called = not isinstance(module, NonDynamicallyQuantizableLinear)
    return called and not isinstance(module, AdapterLinear) and module.weight is not None
