"""Files that do not belong to the base, or are not what their config says: refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft_models import CONFIGS, adapted, bert, layers, predictions, refusal, saved
from torch import nn

from qrlora_kernels.peft import loading

ADAPTERS = ["qr", "lora_xs", "ohora"]
FIRST = "bert.encoder.layer.0.attention.self.query"
OTHER = f"the adapter was trained over another base weight in {FIRST}"


def _peft(base: nn.Module, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, folder)


def _second(base: nn.Module, folder: Path) -> nn.Module:
    first = PeftConfig.from_pretrained(folder)
    first.r, first.file_format = 2, None
    model = PeftModel(base, first)
    model.load_adapter(folder, "second")
    return model


def _transformers(base: Any, folder: Path) -> nn.Module:
    base.load_adapter(str(folder))
    predictions(base)
    return base


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "from_pretrained": _peft,
    "low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(
        base, folder, low_cpu_mem_usage=True
    ),
    "load_adapter": _second,
    "transformers": _transformers,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("save_factors", [False, True], ids=["", "factors"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_another_base_is_refused_by_its_layer(
    adapter: str, save_factors: bool, way: str, tmp_path: Path
) -> None:
    saved(tmp_path, adapter, save_factors=save_factors)
    told = refusal(lambda: WAYS[way](bert(seed=1), tmp_path))
    assert told == f"{OTHER}: its shape or its numbers were others"
    assert refusal(lambda: WAYS[way](bert(), tmp_path)) == ""


def test_another_number_of_directions_is_another_base_first(tmp_path: Path) -> None:
    """τ gives each base its own ranks, and the message is of the base and not of the ranks."""
    saved(tmp_path, "qr_tau")
    assert OTHER in refusal(lambda: _peft(bert(seed=1), tmp_path))


@pytest.mark.parametrize("way", WAYS)
def test_the_base_in_another_dtype_is_told_so(way: str, tmp_path: Path) -> None:
    saved(tmp_path, "qr")
    told = refusal(lambda: WAYS[way](bert(dtype=torch.bfloat16), tmp_path))
    what = "it had dtype float32, and here it has bfloat16: load the base as that, cast later"
    assert told == f"{OTHER}: {what}"


def test_transformers_is_compared_once_and_refused_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "qr")
    calls = []
    check = loading.check
    monkeypatch.setattr(loading, "check", lambda *a: calls.append(a[0].place) or check(*a))
    right, wrong = bert(), bert(seed=1)
    right.load_adapter(str(tmp_path))
    wrong.load_adapter(str(tmp_path))
    predictions(right)
    assert sorted(calls) == sorted(layers(right))
    predictions(right)
    assert len(calls) == len(layers(right))
    for _ in range(2):
        assert OTHER in refusal(lambda: predictions(wrong))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_failed_load_leaves_the_first_adapter_as_it_was(adapter: str, tmp_path: Path) -> None:
    saved(tmp_path / "other", adapter, bert(seed=1))
    want = saved(tmp_path / "own", adapter)
    model = adapted(adapter)
    trained = predictions(model)
    assert OTHER in refusal(lambda: model.load_adapter(tmp_path / "other", "second"))
    assert torch.equal(predictions(model), trained)
    model.load_adapter(tmp_path / "own", "second")  # and another try succeeds
    model.set_adapter("second")
    assert torch.equal(predictions(model), want)


@pytest.mark.parametrize("save_factors", [False, True], ids=["", "factors"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("other", [{"seed": 1}, {"r": 2}], ids=["base", "rank"])
def test_a_failed_load_into_an_adapter_leaves_it_as_it_was(
    other: dict[str, int], adapter: str, save_factors: bool, tmp_path: Path
) -> None:
    base = bert(other.get("seed", 0))
    rank = {"r": other["r"]} if "r" in other else {}
    saved(tmp_path, adapter, base, save_factors=save_factors, **rank)
    model = adapted(adapter)
    trained = predictions(model)
    with pytest.raises((ValueError, RuntimeError), match=r"another base weight|size mismatch"):
        set_peft_model_state_dict(model, load_peft_weights(str(tmp_path)))
    assert torch.equal(predictions(model), trained)


@pytest.mark.parametrize("way", WAYS)
def test_a_newer_format_is_refused(way: str, tmp_path: Path) -> None:
    saved(tmp_path, "qr")
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    assert content["file_format"] == 1
    path.write_text(json.dumps(content | {"file_format": 2}))
    assert "file format 2, and this release of qrlora_kernels reads up to 1" in refusal(
        lambda: WAYS[way](bert(), tmp_path)
    )


@pytest.mark.parametrize("value", ["2", 0, 1.5, True])
def test_a_format_that_is_no_number_of_one_is_refused(value: object) -> None:
    kind, options = CONFIGS["qr"]
    assert "file_format must be" in refusal(lambda: kind(**options, file_format=value))


def test_a_base_without_data_is_named() -> None:
    with torch.device("meta"):
        base = bert()
    assert refusal(lambda: adapted("qr", base)).startswith(
        f"{FIRST}.weight must hold data, got a tensor on the meta device: load the base's weights"
    )
