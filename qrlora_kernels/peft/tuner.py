"""Tuners: what PEFT calls to put our layers into a model, and to save and load them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from ..bank import AdapterBank
from . import combining, loading, merging, mixed
from .config import AdapterConfig
from .held import Made
from .layer import LoraXSLinear, OHoraLinear, QRLoraLinear, _Linear
from .record import head
from .start import start

# Not the tuners' own: a copy of a model has no bank, and a weak reference cannot be pickled.
_banks: WeakKeyDictionary[nn.Module, ref[AdapterBank]] = WeakKeyDictionary()


class AdapterModel(BaseTuner):
    """What the three tuners share."""

    tuner_layer_cls: ClassVar[type[_Linear]]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    peft_config: dict[str, AdapterConfig]

    # --- into the model

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As PEFT's; all layers start as one batch before the first is replaced.

        Every way of adding an adapter comes here, the constructor's, ``add_adapter``'s and
        ``load_adapter``'s.
        """
        self._named_in_file = None if state_dict is None else _layers_in(state_dict, self.prefix)
        try:
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
            )
        finally:
            self._made: dict[str, Made] | None = None

    def _prepare_model(self, peft_config: AdapterConfig, model: nn.Module) -> None:
        """PEFT's hook between the last check and the first replacement."""
        super()._prepare_model(peft_config, model)
        if getattr(self, "_made", None) is None:
            self._made = start(model, self._targets(model, peft_config), peft_config)

    def _targets(self, model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
        """What PEFT is about to hand to :meth:`_create_and_replace`, by its name."""
        resolved = _maybe_include_all_linear_layers(replace(config), model)
        found: dict[str, nn.Module] = {}
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if not name or name.startswith(inside or ("\0",)):
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (f"{name}.",)
            named = self._named_in_file
            if name in named if named is not None else self._matches(resolved, name):
                found[name] = module
        return found

    def _matches(self, config: AdapterConfig, name: str) -> bool:
        return bool(self._check_target_module_exists(config, name))

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert self._made is not None
        made = self._made[current_key]
        kind = self.tuner_layer_cls
        there = target if isinstance(target, kind) else None
        layer = there or kind(target, place=current_key, **get_quantization_kwargs(self))
        layer.update_layer(adapter_name, made)
        if there is None:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put it there, and no more: PEFT's goes on to move it and to give it a weight.

        While a weight is offloaded its device is "meta", and where tokens were trained the
        wrapper's weight is no parameter, which the plain layer has.
        """
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        own = ((n, m) for n, m in self.model.named_modules() if isinstance(m, self.tuner_layer_cls))
        merging.check_apart(own)

    # --- dtypes

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """What trains begins in fp32; down to the base's dtype where PEFT is told not to cast."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for module in self.model.modules():
            if isinstance(module, self.tuner_layer_cls):
                dtype = module.get_base_layer().weight.dtype
                if dtype.is_floating_point:
                    module.cast_trainables(adapter_name, dtype)

    # --- files

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: AdapterConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        if config.save_factors:
            for name, layer in cls._layers(model, adapter_name):
                layer.compare(adapter_name)
                for key, factor in layer.factors(adapter_name).items():
                    found[f"{name}.{cls.prefix}{key}_frozen.{adapter_name}"] = factor.contiguous()
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: AdapterConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """As PEFT's, and the place where a wrong base is refused, before anything is loaded."""
        found: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        taken: dict[str, tuple[dict[str, Tensor], Tensor]] = {}
        frozen = _frozen(found, cls.prefix, adapter_name)
        for name, layer in cls._layers(model, adapter_name):
            saved = found.get(f"{name}.{cls.prefix}record.{adapter_name}")
            device = layer.records[adapter_name].device  # the weight's may be meta, as offloaded
            held = layer.adapter.held_factors(layer.options[adapter_name])
            brought = _brought(frozen, f"{name}.{cls.prefix}", held, device)
            if saved is not None:
                factors = loading.check(layer, adapter_name, saved, brought)
                if factors is not None:
                    taken[name] = factors, head(saved.cpu())
        for name, layer in cls._layers(model, adapter_name):
            if name in taken:
                layer.take_factors(adapter_name, *taken[name])
        return found

    @classmethod
    def _layers(cls, model: nn.Module, adapter_name: str) -> Iterator[tuple[str, _Linear]]:
        for name, module in model.named_modules():
            if isinstance(module, cls.tuner_layer_cls) and module.has(adapter_name):
                yield name, module

    # --- mixed batches and combinations

    def serve_by(self, bank: AdapterBank) -> None:
        """Let ``adapter_names`` mean adapters of ``bank``, where it has one of them."""
        _banks[self] = ref(bank)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        bank = _banks[self]() if self in _banks else None
        if bank is not None and any(name in bank for name in names):
            with bank.use(names):
                yield
            return
        encoder = getattr(self.model, "get_encoder", lambda: None)()
        if encoder is self.model:  # what transformers says of a model that has none
            encoder = None
        with mixed.named_rows(
            self, self.tuner_layer_cls, self.peft_config, encoder, names, kwargs.get("num_beams")
        ):
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add Σ wᵢ ΔWᵢ as an adapter of its own: exact, over the factors that all of them share.

        Parameters
        ----------
        adapters : list of str
        weights : list of float
            As many.
        adapter_name : str
            Nothing happens where there is one of this name, as in PEFT.
        combination_type : "linear"

        Raises
        ------
        ValueError
            If an adapter does not exist, they do not begin from the same factors, or their sum is
            no update of this kind (OHoRA's).
        """
        if adapter_name in self.peft_config:
            return
        combined = combining.combine(self, adapters, weights, combination_type)
        self.peft_config[adapter_name] = combined.config
        self._made = combined.made
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            raise


def _layers_in(state_dict: dict[str, Tensor], prefix: str) -> set[str]:
    return {key.rsplit(f".{prefix}", 1)[0].removeprefix("_orig_mod.") for key in state_dict}


_OF_PEFT = "base_model.model."  # in front of the names that a PeftModel gives, and files have


def _frozen(found: dict[str, Tensor], prefix: str, adapter_name: str) -> dict[str, Tensor]:
    """Factors that the file holds, taken out of what PEFT is to load, by their names in the base.

    PEFT puts the adapter's name behind those for which the model has a place.
    """
    ends = ("_frozen", f"_frozen.{adapter_name}")
    return {
        key.removeprefix(_OF_PEFT).removesuffix(f".{adapter_name}"): found.pop(key)
        for key in list(found)
        if f".{prefix}" in key and key.endswith(ends)
    }


def _brought(
    frozen: dict[str, Tensor], start: str, factors: Iterable[str], device: torch.device
) -> dict[str, Tensor] | None:
    """The factors of one layer, if the file holds them."""
    names = {key: f"{start.removeprefix(_OF_PEFT)}{key}_frozen" for key in factors}
    if not all(name in frozen for name in names.values()):
        return None
    return {key: frozen[name].to(device) for key, name in names.items()}


class QRLoraModel(AdapterModel):
    """Puts :class:`QRLoraLinear` into a model."""

    prefix = "qkdiag_"
    tuner_layer_cls = QRLoraLinear


class LoraXSModel(AdapterModel):
    """Puts :class:`LoraXSLinear` into a model."""

    prefix = "qkcore_"
    tuner_layer_cls = LoraXSLinear


class OHoraModel(AdapterModel):
    """Puts :class:`OHoraLinear` into a model."""

    prefix = "qkkron_"
    tuner_layer_cls = OHoraLinear
