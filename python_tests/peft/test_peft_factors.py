"""Adapters that begin alike share their factors in memory, through moves and casts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft_models import bert, config, layers


def adapters_of(first: Any, *others: Any) -> Any:
    model = get_peft_model(bert(), first, adapter_name="0")
    for i, other in enumerate(others, 1):
        model.add_adapter(str(i), other)
    return model


def starts(model: Any) -> set[int]:
    return {len(layer.factors_of._modules) for layer in layers(model).values()}


@pytest.mark.parametrize("adapter", ["qr_tau", "lora_xs", "ohora"])
def test_the_same_start_is_held_once_and_stays_so(adapter: str) -> None:
    model = adapters_of(config(adapter), config(adapter), config(adapter))
    assert starts(model) == {1}
    model.to(torch.float64)
    assert starts(model) == {1}
    for layer in layers(model).values():
        held = {t.data_ptr() for n in "012" for t in layer.factors_of[n].factors().values()}
        assert len(held) == len(layer.adapter.factors)


@pytest.mark.parametrize("order", [(4, 6, 2), (6, 4, 2), (2, 4, 6)])
def test_a_smaller_rank_of_qr_is_the_beginning_of_a_larger(order: tuple[int, ...]) -> None:
    model = adapters_of(*(config("qr", r=r) for r in order))
    assert starts(model) == {1}
    for layer in layers(model).values():
        for name, rank in zip("012", order, strict=True):
            alone = get_peft_model(bert(), config("qr", r=rank))
            want = layers(alone)[next(n for n, m in layers(model).items() if m is layer)]
            for key, factor in want.factors("default").items():
                assert torch.equal(layer.factors(name)[key], factor)


def test_another_start_is_held_apart() -> None:
    model = adapters_of(config("lora_xs"), config("lora_xs", vectors="bottom"))
    assert starts(model) == {2}
    model.delete_adapter("1")
    assert starts(model) == {1}


def test_a_second_start_of_the_same_options_computes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapters_of(config("qr"))
    monkeypatch.setattr(
        "qrlora_kernels.adapters.qr.linalg.pivoted_qr", lambda *args, **kwargs: 1 / 0
    )
    model.add_adapter("1", config("qr", alpha=3.0, dropout=0.1))
    assert starts(model) == {1}
    with pytest.raises(ZeroDivisionError):
        model.add_adapter("2", config("qr", r=5))
    assert "2" not in model.peft_config


@pytest.mark.parametrize("adapter", ["qr", "lora_xs", "ohora"])
def test_over_a_base_that_changed_meanwhile_a_second_start_is_another(adapter: str) -> None:
    model = adapters_of(config(adapter))
    for layer in layers(model).values():
        with torch.no_grad():
            layer.base_layer.weight.mul_(2).add_(torch.eye(32))
    model.add_adapter("1", config(adapter))
    assert starts(model) == {2}
    for layer in layers(model).values():
        records = layer.records
        assert not torch.equal(records["0"][:3], records["1"][:3])
