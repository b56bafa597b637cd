"""Factors that a file brings, and pivots that another machine chose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft_models import (
    adapted,
    bert,
    config,
    layers,
    predictions,
    refusal,
    saved,
    tokens,
)
from safetensors.torch import load_file, save_file
from torch import nn

from qrlora_kernels import linalg
from qrlora_kernels.peft import merging

ADAPTERS = ["qr", "lora_xs", "ohora"]
FIRST = "bert.encoder.layer.0.attention.self.query"
MUST_COME = f"the factors of {FIRST} must come from the adapter's file"


def _peft(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(bert(), folder)


def _transformers(folder: Path) -> nn.Module:
    model = bert()
    model.load_adapter(str(folder))
    predictions(model)
    return model


WAYS = {"peft": _peft, "transformers": _transformers}
each_way = pytest.mark.parametrize("load", WAYS.values(), ids=WAYS.keys())


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of the file in ``folder``."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _record(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors[f"base_model.model.{FIRST}.{_prefix(tensors)}record"]


def _prefix(tensors: dict[str, torch.Tensor]) -> str:
    (name,) = [name for name in tensors if FIRST in name and name.endswith("record")]
    return name.rsplit(".", 1)[1].removesuffix("record")


# --- factors in the file


@each_way
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_factors_that_no_start_gives_here_are_taken(
    adapter: str, load: Callable[[Path], nn.Module], tmp_path: Path
) -> None:
    """As of another machine: here one of them with another sign."""
    model = adapted(adapter, save_factors=True)
    before = predictions(model)
    for layer in layers(model).values():
        turned = layer.adapter.factors[0]
        factors = layer.factors("default")
        layer.take_factors("default", factors | {turned: -factors[turned]})
    model.save_pretrained(tmp_path)
    want = predictions(model)
    assert not torch.equal(before, want)
    assert torch.equal(predictions(load(tmp_path)), want)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_file_with_factors_needs_no_factorisation(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = saved(tmp_path, adapter, save_factors=True)
    kind = type(PeftConfig.from_pretrained(tmp_path)).adapter
    monkeypatch.setattr(kind, "start", lambda *_: pytest.fail("factorised"))
    assert torch.equal(predictions(_peft(tmp_path)), want)


@each_way
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_file_that_lacks_its_factors_is_refused(
    adapter: str, load: Callable[[Path], nn.Module], tmp_path: Path
) -> None:
    saved(tmp_path, adapter, save_factors=True)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_frozen")]:
            del tensors[name]

    edit(tmp_path, strip)
    assert refusal(lambda: load(tmp_path)).startswith(MUST_COME)


def test_a_config_from_a_file_with_factors_does_not_train_anew(tmp_path: Path) -> None:
    saved(tmp_path / "file", "qr", save_factors=True)
    own = PeftConfig.from_pretrained(tmp_path / "file")
    model = get_peft_model(bert(), own)
    assert refusal(lambda: predictions(model)).startswith(MUST_COME)
    assert refusal(lambda: model.save_pretrained(tmp_path / "again")).startswith(MUST_COME)
    own = PeftConfig.from_pretrained(tmp_path / "file")
    own.file_format = None
    torch.testing.assert_close(predictions(get_peft_model(bert(), own)), predictions(bert()))


def test_a_model_whose_factors_are_awaited_moves_and_drops_adapters(tmp_path: Path) -> None:
    want = saved(tmp_path, "qr", save_factors=True)
    model = get_peft_model(bert(), PeftConfig.from_pretrained(tmp_path)).to("cpu").float()
    for name in ("two", "default"):
        model.load_adapter(tmp_path, name)
    assert torch.equal(predictions(model), want)
    model.add_adapter("three", PeftConfig.from_pretrained(tmp_path))
    model.delete_adapter("three")
    assert not [name for name in model.state_dict() if "_frozen" in name]


def test_an_adapter_beside_an_awaiting_one_has_a_start_of_its_own(tmp_path: Path) -> None:
    saved(tmp_path, "qr", save_factors=True)
    model = get_peft_model(bert(), PeftConfig.from_pretrained(tmp_path))
    model.add_adapter("second", config("qr"))
    for layer in layers(model).values():
        assert layer.factors("second")["q"].any()


def test_awaited_factors_ask_for_a_call_before_compile(tmp_path: Path) -> None:
    want = saved(tmp_path, "qr", save_factors=True)
    model = bert()
    model.load_adapter(str(tmp_path))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"call the model once before torch\.compile"):
        compiled(input_ids=tokens())
    torch.compiler.reset()
    assert torch.equal(predictions(model), want)
    assert torch.equal(predictions(compiled), want)


def test_a_basis_of_gradients_is_saved_with_its_factors() -> None:
    assert config("lora_xs", basis="gradient").save_factors
    assert not config("lora_xs").save_factors


# --- other pivots


def _choose_others(model: nn.Module) -> None:
    """Let every layer have other pivots, as near ties give them elsewhere."""
    for layer in layers(model).values():
        kept = layer.factors("default")
        last = kept["pivots"].clone()
        weight = merging.original_matrix(layer)
        last[-1] = next(c for c in range(weight.shape[1]) if c not in last)
        result = _rebuilt(weight, last)
        layer.take_factors("default", {name: getattr(result, name) for name in kept})


def _rebuilt(weight: torch.Tensor, pivots: torch.Tensor) -> Any:
    return linalg.rebuild_pivoted_qr(weight, pivots)


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_pivots_are_rebuilt(
    dtype: torch.dtype, load: Callable[[Path], nn.Module], tmp_path: Path
) -> None:
    base = bert(dtype=dtype)
    model = adapted("qr", base)
    before = predictions(model)
    _choose_others(model)
    want = predictions(model)
    assert not torch.equal(before, want)
    model.save_pretrained(tmp_path)
    loaded = bert(dtype=dtype)
    if load is _peft:
        loaded = PeftModel.from_pretrained(loaded, tmp_path)
    else:
        loaded.load_adapter(str(tmp_path))
    with torch.autocast("cpu", torch.bfloat16):
        loaded(input_ids=tokens())  # the first call of all must not round what is rebuilt
    assert torch.equal(predictions(loaded), want)


@pytest.mark.parametrize("save_factors", [False, True], ids=["rebuilt", "brought"])
def test_factors_taken_in_inference_mode_can_train(save_factors: bool, tmp_path: Path) -> None:
    model = adapted("qr", save_factors=save_factors)
    _choose_others(model)
    model.save_pretrained(tmp_path)
    loaded = bert()
    loaded.load_adapter(str(tmp_path), is_trainable=True)
    with torch.inference_mode():
        assert torch.equal(predictions(loaded), predictions(model))
    loaded(input_ids=tokens()).logits.sum().backward()
    assert all(layer.qkdiag_lam["default"].grad is not None for layer in layers(loaded).values())


def test_a_model_loaded_in_inference_mode_predicts(tmp_path: Path) -> None:
    want = saved(tmp_path, "qr")
    for load in WAYS.values():
        with torch.inference_mode():
            assert torch.equal(predictions(load(tmp_path)), want)


@each_way
@pytest.mark.parametrize("pivot", [1_000_000, -1, 0], ids=["beyond", "negative", "twice"])
def test_pivots_that_are_none_are_refused(
    pivot: int, load: Callable[[Path], nn.Module], tmp_path: Path
) -> None:
    saved(tmp_path, "qr")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        record = _record(tensors)
        record[3], record[4] = (0, 0) if pivot == 0 else (pivot, record[4])

    edit(tmp_path, change)
    assert FIRST in refusal(lambda: load(tmp_path))


@each_way
def test_pivots_with_another_diagonal_are_refused(
    load: Callable[[Path], nn.Module], tmp_path: Path
) -> None:
    saved(tmp_path, "qr")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        record = _record(tensors)
        record[3:5] = record[3:5].flip(0)

    edit(tmp_path, change)
    told = refusal(lambda: load(tmp_path))
    assert FIRST in told
    assert "the stored pivots do not give the stored diagonal of R" in told


@each_way
@pytest.mark.parametrize("adapter", ["lora_xs", "ohora"])
def test_factors_that_come_out_otherwise_are_refused(
    adapter: str, load: Callable[[Path], nn.Module], tmp_path: Path
) -> None:
    saved(tmp_path, adapter)
    sign = torch.tensor([-(2**63)])  # of a double

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        _record(tensors)[3] ^= sign[0]

    edit(tmp_path, turn)
    told = refusal(lambda: load(tmp_path))
    assert f"the factors of {FIRST} come out otherwise here" in told
    assert "save_factors=True" in told
