"""What a layer under PEFT holds of its adapters: what trains, frozen factors, and their records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapters import Options, State
from ..adapters.low_rank import LowRank
from ..nn import base_weight
from ..nn.per_row import ByRow
from . import loading, merging, record
from .factors import Factors


@dataclass
class Made:
    """What one layer begins with."""

    options: Options
    scaling: float
    state: State  # trainables and factors
    base: Tensor  # the head of its record: what tells the base weight from others
    from_file: bool = False  # whether a file is about to bring the factors, now zeros


class AdaptedLayer(BaseTunerLayer, ByRow):
    """What PEFT knows one of our layers by, and what it holds of its adapters."""

    prefix: ClassVar[str]
    # By adapter: frozen things, which delete_adapter takes off.
    other_param_names: tuple[str, ...] = (
        "r", "scaling", "dropout", "options", "factors_of", "records", "expected",
    )  # fmt: skip

    r: dict[str, int]
    scaling: dict[str, float]
    dropout: dict[str, float]
    options: dict[str, Options]
    expected: dict[str, Tensor]  # the record of the factors that are here
    base_layer: nn.Module

    # PEFT's, which mypy does not read.
    adapter_layer_names: tuple[str, ...]
    get_base_layer: Callable[[], Any]
    get_base_weight: Callable[[], Tensor]
    set_base_weight: Callable[[Tensor], None]
    set_adapter: Callable[..., None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
    active_adapters: list[str]
    merged_adapters: list[str]
    merged: bool
    weight: Tensor

    place: str  # the layer's name in the model, which errors use
    seen: loading.Seen

    @property
    def factors_of(self) -> Factors:
        found: Factors = getattr(self, f"{self.prefix}factors")
        return found

    @property
    def records(self) -> BufferDict:
        found: BufferDict = getattr(self, f"{self.prefix}record")
        return found

    def update_layer(self, name: str, made: Made, inference_mode: bool = False) -> None:
        """Take up the adapter called ``name`` with what its start made."""
        held = self.adapter.held_factors(made.options)
        self.take_factors(name, {key: made.state[key] for key in held}, made.base)
        for key, attribute in self._names():
            getattr(self, attribute)[name] = nn.Parameter(made.state[key].clone())
        self.r[name] = self.adapter.rank(made.state)
        self.scaling[name], self.options[name] = made.scaling, made.options
        self.dropout[name] = made.options.dropout
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)
        if made.from_file:
            for key, factor in self.factors(name).items():
                place = torch.empty_like(factor, device="meta")
                setattr(self, self._awaited(key), loading.Awaited(name, place))

    def take_factors(self, name: str, factors: State, base: Tensor | None = None) -> None:
        """Let the adapter called ``name`` use factors of the weight with the head ``base``.

        By default of the one that its factors were of before.
        """
        self.drop_awaited(name)
        base = record.head(self.expected[name]) if base is None else base
        self.factors_of.put(name, factors)
        self.expected[name] = record.record_of(self.adapter, base, factors)
        # A copy: whoever loads writes into it, and what is expected must not follow.
        device = next(iter(factors.values())).device
        self.records[name] = self.expected[name].to(device, copy=True)
        self.seen.note(name, self.records[name])

    # --- factors that a file is about to bring

    def _awaited(self, key: str) -> str:
        return f"{self.prefix}{key}_frozen"

    def awaited(self, name: str) -> State | None:
        """What stands for the factors of the adapter called ``name`` until a file brings them."""
        places = {key: getattr(self, self._awaited(key), {}) for key in self.adapter.factors}
        return {key: held[name] for key, held in places.items() if name in held} or None

    def drop_awaited(self, name: str) -> None:
        for key in self.awaited(name) or ():
            delattr(self, self._awaited(key))

    # --- tensors

    def _names(self) -> Iterator[tuple[str, str]]:
        """The adapter's name of each trainable, and the attribute that holds it by adapter."""
        return zip(self.adapter.trainables, self.adapter_layer_names, strict=True)

    def trainables(self, name: str) -> State:
        """What trains in the adapter called ``name``; constants where no gradient is recorded.

        PyTorch's products take another way for what asks for a gradient, with other last bits: a
        model that is loaded to be used would differ from the one that was trained.
        """
        found = {key: getattr(self, attribute)[name] for key, attribute in self._names()}
        return found if torch.is_grad_enabled() else {k: t.detach() for k, t in found.items()}

    def factors(self, name: str) -> State:
        """The frozen factors of one adapter, of its rank where it shares a larger one's."""
        found = self.factors_of[name].factors()
        if not issubclass(self.adapter, LowRank):
            return found
        sides = {key: 1 if key == self.adapter.up else 0 for key in found}
        return {key: found[key].narrow(side, 0, self.r[name]) for key, side in sides.items()}

    def tensors(self, name: str, exact: bool = True) -> State:
        """The operands of one adapter.

        The factors may be wider unless ``exact``, and without what follows from the weight.
        """
        tensors = self.trainables(name)
        dtype = next(iter(tensors.values())).dtype
        found = self.factors(name) if exact else self.factors_of[name].factors()
        for key in self.adapter.operands:
            if key in found:
                wide = key in self.adapter.kept_fp32
                tensors[key] = found[key].to(dtype) if wide else found[key]
        if not exact or tensors.keys() == set(self.adapter.operands):
            return tensors
        with base_weight.present(self.get_base_layer()):
            return self.adapter.completed(tensors, merging.original_matrix(self))

    # --- rows of adapters that no name in PEFT stands for, over the factors of the active adapter

    def _active(self) -> str:
        (name,) = (name for name in self.active_adapters if self.has(name))
        return name

    def trained_now(self) -> State:
        return {key: getattr(self, held)[self._active()] for key, held in self._names()}

    def frozen_now(self) -> State:
        return self.factors(self._active())

    def begin(self) -> State:
        name = self._active()
        return self.adapter.fresh(self._frozen(name), self.options[name])

    def silent(self) -> State:
        name = self._active()
        return self.adapter.silent(self._frozen(name), self.options[name])

    def _frozen(self, name: str) -> State:
        found = self.factors(name)
        dtype = next(iter(self.trained_now().values())).dtype
        return {k: t.to(dtype) if k in self.adapter.kept_fp32 else t for k, t in found.items()}

    def began_from(self) -> tuple[Tensor, State, float]:
        name = self._active()
        factors = self.factors_of[name].factors() | self._frozen(name)
        return self.get_base_weight(), factors, self.scaling[name]

    def check_by_row(self, name: str) -> None:
        if self.merged:
            raise ValueError(f"{name} must not be merged for rows of other adapters: unmerge first")
        here = [one for one in self.active_adapters if self.has(one)]
        if len(here) != 1:
            raise ValueError(
                f"{name} must have one active adapter, over whose factors rows have theirs, got "
                f"{here}"
            )

    def has(self, name: str) -> bool:
        return name in self.r

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.drop_awaited(adapter_name)
        self.seen.forget(adapter_name)

    # --- PEFT moves and casts

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Without a cast: PEFT would round what trains to the base's dtype."""
        device = self.get_base_layer().weight.device if device is None else device
        if device.type == "meta":
            return
        for attribute in self.adapter_layer_names:
            held = getattr(self, attribute)
            if adapter_name in held and held[adapter_name].device.type != "meta":
                held[adapter_name].data = held[adapter_name].data.to(device)
        if self.has(adapter_name):
            self.factors_of.to(device)
            self.records.to(device)

    def cast_trainables(self, name: str, dtype: torch.dtype) -> None:
        for attribute in self.adapter_layer_names:
            held = getattr(self, attribute)
            if name in held:
                held[name].data = held[name].data.to(dtype)
