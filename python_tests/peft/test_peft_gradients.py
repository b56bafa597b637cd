"""Gradients of the PEFT methods under checkpointing, torch.compile and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_models import (
    TARGETS,
    adapted,
    bert,
    config,
    gpt2,
    llama,
    move,
    predictions,
    saved,
    tokens,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

ADAPTERS = ["qr", "lora_xs", "ohora"]
BASES = {"llama": llama, "gpt2": gpt2}


def _model(adapter: str, base: str = "llama", **options: Any) -> PeftModel:
    model = get_peft_model(
        BASES[base](),
        config(adapter, target_modules=TARGETS[base], task_type="CAUSAL_LM", **options),
    )
    move(model)
    return model.train()


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    logits = model(input_ids=tokens()).logits
    cross_entropy(logits.flatten(0, 1).float(), tokens().flatten()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_checkpointing_gives_the_same_gradients(
    adapter: str, use_reentrant: bool, dropout: float
) -> None:
    model = _model(adapter, dropout=dropout)
    model.enable_input_require_grads()  # as checkpointing does: more gradients, other last bits
    want = _gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert any(bool(gradient.any()) for gradient in want.values())
    found = _gradients(model)
    assert found.keys() == want.keys() != set()
    for name, gradient in found.items():
        # PyTorch's products take another way without gradients, in which the first of two calls is.
        close = {"rtol": 1e-5, "atol": 1e-6} if use_reentrant else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(gradient, want[name], **close)


@pytest.fixture
def compiled() -> Iterator[Any]:
    """Compiles whole, without a compiler behind it; what was compiled before is forgotten."""
    torch.compiler.reset()
    yield partial(torch.compile, backend="aot_eager", fullgraph=True)
    torch.compiler.reset()


def _net(adapter: str) -> PeftModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    model = get_peft_model(net, config(adapter, target_modules=["0", "2"]))
    move(model)
    return model


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_compiled_net_trains_alike(adapter: str, compiled: Any) -> None:
    model = _net(adapter)
    x = torch.randn(5, 16)
    fast = compiled(model)
    model(x).square().sum().backward()
    trains = [p for p in model.parameters() if p.requires_grad]
    want = [p.grad.clone() for p in trains]
    model.zero_grad()
    fast(x).square().sum().backward()
    for parameter, gradient in zip(trains, want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_compiled_net_follows_its_training(adapter: str, compiled: Any) -> None:
    """Nothing of an adapter's numbers stays in the graph."""
    model = _net(adapter).eval()
    fast, x = compiled(model), torch.randn(5, 16)
    with torch.no_grad():
        before = fast(x)
        move(model, seed=4)
        after = fast(x)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, model(x))


def test_a_compiled_language_model_predicts_alike(compiled: Any) -> None:
    model = _model("qr", "gpt2")
    want = predictions(model)
    torch.testing.assert_close(predictions(compiled(model)), want)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_autocast_trains_in_fp32_over_rounded_products(adapter: str) -> None:
    model = _model(adapter)
    want = _gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens()).logits
        found = _gradients(model)
    assert logits.dtype == torch.bfloat16
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), want[name].flatten(), 0)
        assert cosine > 0.9, name


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_model_loaded_under_autocast_is_the_saved_one(adapter: str, tmp_path: Path) -> None:
    """The start is no product that autocast rounds."""
    want = saved(tmp_path, adapter)
    with torch.autocast("cpu", torch.bfloat16):
        loaded = PeftModel.from_pretrained(bert(), tmp_path)
        fresh = adapted(adapter)
    assert torch.equal(predictions(loaded), want)
    assert torch.equal(predictions(fresh), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_trains_over_half_precision_is_fp32(adapter: str, dtype: torch.dtype) -> None:
    model = get_peft_model(bert(dtype=dtype), config(adapter)).train()
    trains = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trains} == {torch.float32}
    model(input_ids=tokens(), labels=torch.arange(4) % 3).loss.backward()
    assert {p.grad.dtype for p in trains} == {torch.float32}
    model = get_peft_model(bert(dtype=dtype), config(adapter), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    model(input_ids=tokens(), labels=torch.arange(4) % 3).loss.backward()
