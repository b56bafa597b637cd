"""The plugin of pytest that runs PEFT's tests for other config classes than PEFT's."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, VeraConfig

from . import rows
from .rows import Method
from .stand_ins import stand_ins

# The lists of rows that the general tests share name VeRA; these of LoRA's tests are general too.
_ALSO_GENERAL = (
    "test_mixed_adapter_batches_mlp",
    "test_mixed_adapter_batches_different_target_layers",
    "test_mixed_adapter_batches_multiple_modules_to_save",
    "test_mixed_adapter_batches_unsupported_layer_raises",
    "test_mixed_adapter_batches_partly_overlapping_target_layers",
    "test_mixed_adapter_batches_length_mismatch_raises",
    "test_mixed_adapter_batches_training_mode_raises",
    "test_mixed_adapter_batches_disabled",
    "test_mixed_adapter_batches_merged_raises",
    "test_mixed_adapter_batches_lora_wrong_adapter_name_raises",
    "test_multiple_adapters_mixed_modules_to_save",
    "test_multiple_adapters_mixed_modules_to_save_order_switched",
    "test_default_target_modules_not_set_raises",
    "test_default_target_modules_not_set_model_type_set_raises",
    "test_default_target_modules_list_of_str",
    "test_default_target_modules_str",
    "test_save_pretrained_with_target_modules",
    # Beside trained tokens of an embedding.
    "test_combined_with_peft_method_usage",
    "test_combined_with_peft_raises_target_layer_not_found",
    "test_disable_adapters_with_merging",
    "test_load_multiple_adapters",
    "test_modules_to_save_excludes_trainable_tokens",
    "test_no_embeddings_in_save_with_combined_usage",
    "test_safe_merge_with_adapter",
    "test_save_pretrained_auto",
    "test_weight_tying_noop_when_model_is_untied",
)
# Tests on models that skip all classes but LoRA's, or but a few on GPT-2 for its Conv1D.
_MIXED_ON_MODELS = ("test_mixed_adapter_batches", "test_generate_with_mixed_adapter_batches")
_ON_GPT2 = (
    "test_merge_layers",
    "test_merge_layers_nan",
    "test_merge_layers_fp16",
    "test_generate_half_prec",
    "test_training_decoders_layer_indexing",
    "test_peft_model_device_map",
)
# Tests that save an adapter over one random model and load it over another, which is refused.
_LOADS_OVER_ANOTHER_BASE = (
    "test_loading_model_requires_grad_set_correctly",
    "test_loading_model_with_modules_to_save_requires_grad_set_correctly",
)
# Fields of LoRA's and VeRA's rows that are ours as well.
_SHARED = ("task_type", "target_modules", "modules_to_save", "trainable_token_indices")
_SHORT_MODEL = "LlamaForCausalLM"


class Suite:
    """Gives the general tests the rows of some methods, and takes all other tests out."""

    def __init__(self, methods: Sequence[Method], short: bool) -> None:
        self.methods = methods
        self.short = short
        self.method_of: dict[str, Method] = {}  # of a test, by pytest's name of it
        self._imports = ExitStack()

    def pytest_sessionstart(self) -> None:
        pytest.register_assert_rewrite("tests.testing_common", "tests.testing_utils")
        self._imports.enter_context(stand_ins())
        # Before testing_common takes its own reference: it would tell the libraries that the
        # network is there.
        utilities = importlib.import_module("tests.testing_utils")
        utilities.hub_online_once = nullcontext

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        marks = metafunc.definition.own_markers
        for index, mark in enumerate(marks):
            if mark.name == "parametrize":
                marks[index] = self._with_our_rows(metafunc.definition.originalname, mark)

    def _with_our_rows(self, test: str, mark: pytest.Mark) -> pytest.Mark:
        names, values = _names(mark.args[0]), list(mark.args[1])
        if names == ("model_id",) and self.short:
            values = [value for value in values if _SHORT_MODEL in value]
        elif any(_holds(_as_tuple(value), VeraConfig) for value in values):
            values = self._rows(names, values)
        elif test in _ALSO_GENERAL and any(_holds(_as_tuple(v), LoraConfig) for v in values):
            values = self._translated(names, values, LoraConfig)
        else:
            return mark
        return pytest.mark.parametrize(mark.args[0], values).mark

    def _rows(self, names: tuple[str, ...], values: list[Any]) -> list[Any]:
        by_columns = {
            ("test_name", "model_id", "config_cls", "config_kwargs"): rows.custom_rows,
            (
                "test_name",
                "tuner_method",
                "config_cls",
                "config_kwargs_1",
                "config_kwargs_2",
            ): rows.pair_rows,
        }
        if names in by_columns:
            return [row for m in self.methods for row in by_columns[names](m, self.short)]
        return self._translated(names, values, VeraConfig)

    def _translated(
        self, names: tuple[str, ...], values: list[Any], theirs: type[PeftConfig]
    ) -> list[Any]:
        """The rows of a class of PEFT's, for each of our methods."""
        found = [row for row in map(_as_tuple, values) if _holds(row, theirs)]
        ours = [
            tuple(_translate(value, theirs, method) for value in row)
            for method in self.methods
            if method.like_lora or theirs is VeraConfig
            for row in found
        ]
        return [row[0] for row in ours] if len(names) == 1 else ours

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        kept, left = [], []
        for item in items:
            method = self._method(item)
            if method is not None:
                self.method_of[item.nodeid] = method
            (left if method is None else kept).append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=left)
        self._imports.close()

    def _method(self, item: pytest.Item) -> Method | None:
        callspec = getattr(item, "callspec", None)
        values = () if callspec is None else tuple(callspec.params.values())
        return next((m for m in self.methods if _holds(values, m.config)), None)

    @pytest.fixture(autouse=True)
    def _as_the_suite_needs_it(
        self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        test, method = request.function.__name__, self.method_of[request.node.nodeid]
        if test in _LOADS_OVER_ANOTHER_BASE:
            seeded = _seeded(request.module.DeepMLP)
            monkeypatch.setattr(request.module, "DeepMLP", seeded)
        model = request.node.callspec.params.get("model_id", "")
        on_gpt2 = "GPT2" in model and test in _ON_GPT2
        if method.like_lora and (on_gpt2 or (test in _MIXED_ON_MODELS and model)):
            for module in (importlib.import_module("tests.testing_common"), request.module):
                monkeypatch.setattr(module, "LoraConfig", method.config)


def _names(names: str | Iterable[str]) -> tuple[str, ...]:
    parts = names.split(",") if isinstance(names, str) else names
    return tuple(part.strip() for part in parts)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(getattr(value, "values", value)) if isinstance(value, tuple) else (value,)


def _holds(values: tuple[Any, ...], config: type[PeftConfig]) -> bool:
    return any(value is config or type(value) is config for value in values)


def _translate(value: Any, theirs: type[PeftConfig], method: Method) -> Any:
    """A class, a config or the options of one, and everything else as it is."""
    if value is theirs:
        return method.config
    if type(value) is theirs:
        options = {k: v for k in _SHARED if (v := getattr(value, k, None)) is not None}
        options["init_weights"] = value.init_lora_weights
        return method.config(**{**method.custom, **options})
    if isinstance(value, dict):
        options = {k: value[k] for k in _SHARED if k in value}
        return {**method.transformers, **options} if value else {}
    return value


def _seeded(model: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class, but that all its models hold the same numbers."""

    class Seeded(model):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                super().__init__(*args, **kwargs)

    return Seeded
