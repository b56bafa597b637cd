"""Batches whose rows have adapters of their own: each row as if its adapter were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft_models import CONFIGS, bert, config, gpt2, layers, llama, move, tokens
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from qrlora_kernels.peft import mixed

NAMES = ["one", "two", "__base__", "one"]


def of_two(
    adapter: str, base: nn.Module, second: dict[str, Any] | None = None, **options: Any
) -> Any:
    model = get_peft_model(base, config(adapter, **options), adapter_name="one")
    move(model)
    model.add_adapter("two", config(adapter, **options | (second or {})))
    model.set_adapter("two")
    move(model, seed=2)
    return model.eval()


@torch.no_grad()
def alone(model: Any, name: str, ask: Any) -> Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return ask(model)
    model.set_adapter(name)
    return ask(model)


def logits(model: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), **kwargs).logits


def assert_rows_are_alone(model: Any) -> None:
    """Each row of a mixed batch is what its adapter alone answers."""
    got = logits(model, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        want = alone(model, name, logits)[row]
        torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", CONFIGS)
@pytest.mark.parametrize(
    "second",
    [
        {},
        {"alpha": 3.0},
        {"target_modules": ["query"]},
        {"target_modules": ["value", "dense"]},
        {"dropout": 0.5},
    ],
    ids=lambda options: next(iter(options), "alike"),
)
def test_each_row_is_what_its_adapter_alone_answers(adapter: str, second: dict[str, Any]) -> None:
    model = of_two(adapter, bert(), second)
    assert_rows_are_alone(model)


@pytest.mark.parametrize(
    ("adapter", "second"),
    [
        ("qr", {"r": 2}),
        ("qr", {"r": 7}),
        ("lora_xs", {"r": 3}),
        ("lora_xs", {"vectors": "bottom"}),
        ("lora_xs", {"basis": "random", "r": 6}),
        ("ohora", {"start": "kaiming"}),
        ("ohora", {"product": "materialised"}),
    ],
    ids=str,
)
def test_ranks_and_starts_may_differ_between_rows(adapter: str, second: dict[str, Any]) -> None:
    model = of_two(adapter, bert(), second)
    assert_rows_are_alone(model)


@pytest.mark.parametrize("adapter", ["qr", "lora_xs"])
def test_over_shared_factors_a_layer_makes_one_call(
    adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of_two(adapter, bert(), {"r": 3})
    calls: list[int] = []
    fused = mixed.functional.mixed_low_rank_linear
    monkeypatch.setattr(
        mixed.functional,
        "mixed_low_rank_linear",
        lambda *args: (calls.append(1), fused(*args))[1],
    )
    monkeypatch.setattr(mixed, "_by_groups", None)
    logits(model, adapter_names=NAMES)
    assert len(calls) == len(layers(model))


@pytest.mark.parametrize("adapter", ["qr", "ohora"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generates_row_by_row(adapter: str, beams: int, family: str) -> None:
    made = {"llama": llama, "gpt2": gpt2, "t5": t5}[family]()
    where = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn"], "t5": ["q", "v"]}[family]
    model = of_two(adapter, made, target_modules=where)

    def generate(model: Any, **kwargs: Any) -> Tensor:
        return model.generate(
            input_ids=tokens(), max_new_tokens=4, num_beams=beams, do_sample=False, **kwargs
        )

    got = generate(model, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        want = alone(model, name, generate)[row]
        both = min(len(want), got.shape[1])
        assert torch.equal(got[row, :both], want[:both]), name


def t5() -> Any:
    torch.manual_seed(0)
    sizes = T5Config(
        d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, vocab_size=40,
        decoder_start_token_id=0, initializer_factor=3.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(sizes).eval()


def test_heads_that_train_in_full_go_by_row_too() -> None:
    model = of_two("qr", bert(), modules_to_save=["classifier"])
    assert_rows_are_alone(model)


def test_over_a_base_that_somebody_listens_to() -> None:
    model = of_two("qr", bert())
    want = logits(model, adapter_names=NAMES)
    heard: list[int] = []
    for layer in layers(model).values():
        layer.base_layer.register_forward_hook(lambda *args: heard.append(1))
    torch.testing.assert_close(logits(model, adapter_names=NAMES), want, rtol=1e-5, atol=1e-5)
    assert heard


def test_names_are_checked_in_pefts_words_and_hooks_come_off() -> None:
    model = of_two("qr", bert())
    want = logits(model)
    with pytest.raises(ValueError, match="non-existing adapter\\(s\\): three"):
        logits(model, adapter_names=["one", "three", "one", "two"])
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 3"):
        logits(model, adapter_names=["one", "two", "one"])
    with pytest.raises(TypeError, match="expected a list of str"):
        logits(model, adapter_names="one")
    for wrong in (1, None, ["one"]):
        with pytest.raises(TypeError, match="must be a list of str"):
            logits(model, adapter_names=["one", wrong, "one", "two"])
    with pytest.raises(ValueError, match="training mode"):
        logits(model.train(), adapter_names=NAMES)
    assert torch.equal(logits(model.eval()), want)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        logits(model, adapter_names=NAMES)
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)


def test_the_cost_of_names_does_not_grow_with_the_adapters_that_are_there() -> None:
    """Nothing walks over all of them: what is not in the batch is never looked at."""
    model = of_two("qr", bert())
    want = logits(model, adapter_names=NAMES)
    for layer in layers(model).values():
        for attribute in layer.adapter_layer_names:
            getattr(layer, attribute).keys = lambda: 1 / 0
            getattr(layer, attribute).items = lambda: 1 / 0
    assert torch.equal(logits(model, adapter_names=NAMES), want)


@pytest.mark.parametrize("adapter", CONFIGS)
def test_gradients_reach_the_adapters_of_the_rows(adapter: str) -> None:
    """In eval mode, which PEFT asks for; each adapter's is the sum over its own rows."""
    model = of_two(adapter, bert(), {"alpha": 3.0})
    model.base_model.set_adapter(["one", "two"])
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    (model(input_ids=tokens(), adapter_names=NAMES).logits * weight).sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for name in ("one", "two"):
        model.set_adapter(name)
        mine = torch.tensor([own == name for own in NAMES])
        (model(input_ids=tokens()).logits * weight)[mine].sum().backward()
        want = {n: p.grad for n, p in model.named_parameters() if f".{name}" in n}
        assert want
        for parameter, gradient in want.items():
            torch.testing.assert_close(got[parameter], gradient, rtol=1e-4, atol=1e-5)
        model.zero_grad()
