"""What a file brings to a layer: compared with the base that is there, and taken up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from ..adapters import State
from ..linalg import StartRunner
from ..nn import base_weight
from . import merging, record

if TYPE_CHECKING:
    from .layer import _Linear


class Awaited(BufferDict):
    """One factor of the adapter ``name`` that a file is to bring: on the meta device until then.

    Persistent, so that whoever loads finds a place in the state dict. There between an adapter's
    start and its loading alone.
    """

    def __init__(self, name: str, place: Tensor) -> None:
        super().__init__({name: place}, persistent=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow the layer with what came: a place alone has no numbers that could move."""
        self.update({name: fn(factor) for name, factor in self.items() if not factor.is_meta})
        return self


class Seen:
    """Which record of an adapter was compared last, and in which state."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[Tensor, int]] = {}

    def note(self, name: str, held: Tensor) -> None:
        self._last[name] = held, _writes(held)

    def knows(self, name: str, held: Tensor) -> bool:
        seen, writes = self._last.get(name, (None, 0))
        return held is seen and writes == _writes(held)

    def forget(self, name: str) -> None:
        self._last.pop(name, None)


def _writes(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # which an inference tensor lacks


def check(layer: _Linear, name: str, saved: Tensor, brought: State | None = None) -> State | None:
    """The factors to take in place of those that are here, or None where those are right.

    Parameters
    ----------
    layer : _Linear
    name : str
        The adapter's.
    saved : Tensor
        The record in the file.
    brought : dict of Tensor, optional
        The factors in the file; only whether they belong to this base is asked of them.

    Raises
    ------
    OtherBase
        The file belongs to another base weight.
    ValueError
        As :func:`record.check` does, and where awaited factors are not in the file.
    """
    own, saved = layer.expected[name], saved.cpu()
    replaced = _came_with_its_base(layer, own, saved)
    if not replaced:
        record.check_base(layer.place, own, saved)
    if saved.shape != own.shape:
        return None  # another rank: who loads refuses it with both shapes
    if brought is not None:
        return brought
    if blank(layer, name):
        raise ValueError(missing(layer))
    if torch.equal(saved, own):
        return None
    with base_weight.present(layer.get_base_layer()):
        weight = merging.original_matrix(layer)
        anew = _anew(layer, name, weight) if replaced else None
        if anew is not None:
            own = record.record_of(layer.adapter, record.head(saved), anew)
        options = layer.options[name]
        rebuilt = record.check(layer.adapter, layer.place, own, saved, weight, options)
    return anew if rebuilt is None else rebuilt


def _came_with_its_base(layer: _Linear, own: Tensor, saved: Tensor) -> bool:
    """Whether the base's weight was replaced since the start by the one that ``saved`` is of.

    As by the state dict of a whole model, which holds both.
    """
    if torch.equal(record.head(own), record.head(saved)):
        return False
    with base_weight.present(layer.get_base_layer()):
        here = record.head_of(merging.original_stored(layer), layer.get_base_layer())
    return torch.equal(here, record.head(saved))


def _anew(layer: _Linear, name: str, weight: Tensor) -> State:
    """The factors that the adapter called ``name`` would begin with from ``weight``."""
    fixed: dict[str, Any] = {"rank": layer.r[name]}
    if hasattr(layer.options[name], "tau"):
        fixed["tau"] = None
    options = replace(layer.options[name], **fixed)
    gradients = {layer.place: base_weight.gradient(layer.get_base_layer())}
    with torch.random.fork_rng(devices=[]):  # the trainables' start is not of interest
        made = layer.adapter.start({layer.place: weight}, options, StartRunner(), gradients)
    return {key: made[layer.place][key] for key in layer.adapter.held_factors(options)}


def compare(layer: _Linear, name: str) -> None:
    """:func:`check` the record of an adapter, once after it was written to, before a forward.

    PEFT's loading asks the tuner; transformers' writes tensors one by one and asks nobody.
    """
    if torch.compiler.is_compiling():
        if layer.awaited(name) is not None:
            raise ValueError(
                f"call the model once before torch.compile, so that {layer.place} "
                "takes up the factors that were loaded"
            )
        return
    held: Tensor = layer.records[name]
    if layer.seen.knows(name, held) and layer.awaited(name) is None:
        return
    with torch.inference_mode(False):  # the factors outlive this call
        factors = check(layer, name, held, arrived(layer, name))
        if factors is not None:
            layer.take_factors(name, factors, record.head(held.cpu()))
        layer.drop_awaited(name)
    layer.seen.note(name, layer.records[name])


def require_own_base(layer: _Linear, name: str) -> None:
    """Raise where an update that is made of the base's weight would be made of another.

    That is, of the same dtype and other bits: others may have merged their updates into it.
    """
    if layer.options[name].form != "output":
        return
    base = layer.get_base_layer()
    with base_weight.present(base):
        here = record.head_of(merging.original_stored(layer), base)
    own = record.head(layer.expected[name])
    if bool(here[0] == own[0]) and not torch.equal(here, own):
        raise ValueError(
            f"{layer.place}.weight must be the one that the adapter {name!r} began with, since "
            "with factors='output' its update is made of that, got another: take others' updates "
            "out of it first, or use factors='both'"
        )


def arrived(layer: _Linear, name: str) -> State | None:
    """The awaited factors of an adapter, if all of them came."""
    found = layer.awaited(name)
    return None if found is None or any(one.is_meta for one in found.values()) else found


def blank(layer: _Linear, name: str) -> bool:
    """Whether an adapter has zeros in place of its factors: no start gives those."""
    if layer.awaited(name) is None:
        return False
    return not any(bool(one.any()) for one in layer.factors(name).values())


def missing(layer: _Linear) -> str:
    return (
        f"the factors of {layer.place} must come from the adapter's file, as its config says, and "
        "have not: load the file; to train anew with this config, set its file_format to None"
    )
