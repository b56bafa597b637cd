"""The folder that to_lora writes, through PEFT and by each server's rule of reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import readers
import torch
from exported import BASES, RANKS, adapt, adapted, distance, llama, logits, meant, move
from peft import PeftModel, get_peft_model
from torch import nn

import qrlora_kernels as qk
import qrlora_kernels.peft as qkp

FORMS = ("padded", "pattern")
forms = pytest.mark.parametrize("form", FORMS)
models = pytest.mark.parametrize("name", list(BASES))
adapters = pytest.mark.parametrize("adapter", ["qr", "lora_xs"])
# Relative to the update: A and B in fp32, base and update apart, each rounded.
FP32 = 1e-4


def through_peft(name: str, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(BASES[name](), folder).eval()


def assert_served(name: str, folder: Path, wanted: torch.Tensor) -> None:
    """Plain PEFT answers ``wanted``."""
    found = logits(through_peft(name, folder))
    assert distance(found, wanted, logits(BASES[name]())) < FP32


@forms
@adapters
@models
def test_peft_answers_the_same(name: str, adapter: str, form: Any, tmp_path: Path) -> None:
    model = adapted(name, adapter, **({"alpha": 6.0} if adapter == "lora_xs" else {}))
    assert qk.to_lora(model, tmp_path, form) == {}
    assert (
        distance(logits(through_peft(name, tmp_path)), logits(model), logits(BASES[name]())) < FP32
    )


@forms
@models
def test_every_layer_by_peft_rule(name: str, form: Any, tmp_path: Path) -> None:
    model = adapted(name)
    qk.to_lora(model, tmp_path, form)
    readers.assert_same(readers.by_peft(tmp_path), meant(model))
    ranks = {n: len(a) for n, (a, _) in readers.pairs(tmp_path).items()}
    largest = max(RANKS[name].values())
    assert ranks == (RANKS[name] if form == "pattern" else dict.fromkeys(RANKS[name], largest))
    said = readers.config(tmp_path)
    assert (said["r"], said["lora_alpha"]) == (largest, largest)


def test_every_server_reads_the_padded_form(tmp_path: Path) -> None:
    model = adapted("llama")
    qk.to_lora(model, tmp_path)
    for read in (readers.by_peft, readers.by_vllm, readers.by_old_vllm, readers.by_llama_cpp):
        readers.assert_same(read(tmp_path), meant(model))


def test_the_readers_see_what_pattern_does_elsewhere(tmp_path: Path) -> None:
    """Else the rules would prove nothing."""
    model = adapted("llama")
    qk.to_lora(model, tmp_path, "pattern")
    readers.assert_same(readers.by_old_vllm(tmp_path), meant(model))
    with pytest.raises(AssertionError):
        readers.assert_same(readers.by_llama_cpp(tmp_path), meant(model))
    with pytest.raises(AssertionError):
        readers.by_sglang(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@forms
def test_half_precision_files_round_once(form: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted("llama")
    qk.to_lora(model, tmp_path, form, dtype=dtype)
    held = readers.tensors(tmp_path)
    assert {t.dtype for t in held.values()} == {dtype}
    for name, layer in qk.adapted_layers(model).items():
        wanted = dict(zip("AB", layer.lora_factors(), strict=True))
        for side, want in wanted.items():
            found = held[f"base_model.model.{name}.lora_{side}.weight"]
            found = found[: len(want)] if side == "A" else found[:, : want.shape[1]]
            assert torch.equal(found, want.to(dtype))


@forms
def test_a_model_in_half_precision(form: Any, tmp_path: Path) -> None:
    model = adapted("llama", dtype=torch.bfloat16)
    qk.to_lora(model, tmp_path, form)
    readers.assert_same(readers.by_peft(tmp_path), meant(model))
    base = llama().bfloat16()
    served = PeftModel.from_pretrained(llama().bfloat16(), tmp_path)
    assert distance(logits(served), logits(model), logits(base)) < 0.1


def test_fp64_becomes_fp32(tmp_path: Path) -> None:
    model = adapted("llama", dtype=torch.float64)
    qk.to_lora(model, tmp_path)
    assert {t.dtype for t in readers.tensors(tmp_path).values()} == {torch.float32}
    readers.assert_same(readers.by_peft(tmp_path), meant(model))


# --- directions that are zero


def test_rows_with_zero_lambda_are_left_out(tmp_path: Path) -> None:
    model = adapted("llama")
    name = "model.layers.1.self_attn.q_proj"  # the one of the largest rank
    with torch.no_grad():
        qk.adapted_layers(model)[name].lam[[1, 3, 6]] = 0.0
    qk.to_lora(model, tmp_path)
    assert readers.config(tmp_path)["r"] == 5
    readers.assert_same(readers.by_peft(tmp_path), meant(model))


@forms
def test_an_untrained_adapter_is_one_zero_row(form: Any, tmp_path: Path) -> None:
    model = adapt(llama(), RANKS["llama"])
    for layer in qk.adapted_layers(model).values():
        nn.init.zeros_(layer.lam)
    qk.to_lora(model, tmp_path, form)
    assert readers.config(tmp_path)["r"] == 1
    assert all(not delta.any() for delta in readers.by_peft(tmp_path).values())
    assert torch.equal(logits(through_peft("llama", tmp_path)), logits(llama()))


# --- states of a model


def test_a_merged_model_gives_the_same_files(tmp_path: Path) -> None:
    model = adapted("llama")
    qk.to_lora(model, tmp_path / "before")
    qk.to_lora(qk.merge(model), tmp_path / "merged")
    for name, tensor in readers.tensors(tmp_path / "before").items():
        assert torch.equal(readers.tensors(tmp_path / "merged")[name], tensor)


def test_inside_disabled_the_adapter_is_written(tmp_path: Path) -> None:
    model = adapted("llama")
    with qk.disabled(model):
        qk.to_lora(model, tmp_path)
    readers.assert_same(readers.by_peft(tmp_path), meant(model))


@pytest.mark.parametrize("strength", [0.5, -2.0, 0.0])
def test_the_strength_counts(strength: float, tmp_path: Path) -> None:
    model = adapted("llama")
    full = meant(model)
    qk.to_lora(qk.scale(model, strength), tmp_path)
    wanted = {name: strength * delta for name, delta in full.items()}
    readers.assert_same(readers.by_peft(tmp_path), wanted)


def test_adapters_of_several_kinds(tmp_path: Path) -> None:
    model = adapted("llama")
    adapt(model, {"model.layers.0.mlp.up_proj": 4}, "lora_xs")
    qk.to_lora(model, tmp_path)
    assert_served("llama", tmp_path, logits(model))


def test_a_compiled_model(tmp_path: Path) -> None:
    model = adapted("llama")
    qk.to_lora(torch.compile(model), tmp_path)
    readers.assert_same(readers.by_peft(tmp_path), meant(model))


def test_ohora_multiplied_as_lora_is_exact(tmp_path: Path) -> None:
    model = llama()
    qk.adapt(model, ["q_proj"], "ohora", product="lora", columns="selected", progress=False)
    move(model)
    qk.to_lora(model, tmp_path)
    readers.assert_same(readers.by_peft(tmp_path), meant(model), rtol=1e-5)


def test_a_changed_base_is_told(tmp_path: Path) -> None:
    model = adapted("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(0.01)
    with pytest.warns(UserWarning, match=r"layers\.0\.self_attn\.q_proj were changed") as told:
        qk.to_lora(model, tmp_path)
    assert told[0].filename == __file__


# --- cut down


def test_ohora_truncated_states_its_error(tmp_path: Path) -> None:
    model = llama()
    qk.adapt(model, ["q_proj"], "ohora", columns="selected", progress=False)
    move(model)
    with pytest.warns(UserWarning, match="truncated 2 updates; relative error up to"):
        errors = qk.to_lora(model, tmp_path, truncate=6)
    found, wanted = readers.by_peft(tmp_path), meant(model)
    assert errors.keys() == wanted.keys()
    for name, want in wanted.items():
        best = torch.linalg.svdvals(want)[6:].norm() / want.norm()
        assert float(best) > 0.01  # else nothing was cut
        assert errors[name] == pytest.approx(float(best), rel=0.01)
        actual = float((found[name] - want).norm() / want.norm())
        assert errors[name] == pytest.approx(actual, rel=1e-3)


def test_truncation_leaves_smaller_ranks_alone(tmp_path: Path) -> None:
    model = adapted("llama")
    with pytest.warns(UserWarning, match="truncated 1 updates"):
        errors = qk.to_lora(model, tmp_path, "pattern", truncate=5)
    assert set(errors) == {"model.layers.1.self_attn.q_proj"}
    assert readers.config(tmp_path)["r"] == 5


# --- under PEFT


@pytest.mark.parametrize("kind", [qkp.QRLoraConfig, qkp.LoraXSConfig])
@forms
def test_a_model_under_peft(kind: Any, form: Any, tmp_path: Path) -> None:
    config = kind(r=4, alpha=6.0, target_modules=["query", "dense"], modules_to_save=["classifier"])
    model = get_peft_model(BASES["bert"](), config)
    move(model)
    qk.to_lora(model, tmp_path, form)
    assert readers.config(tmp_path)["modules_to_save"] == ["classifier"]
    assert (
        distance(logits(through_peft("bert", tmp_path)), logits(model), logits(BASES["bert"]()))
        < FP32
    )


def test_a_named_adapter_under_peft(tmp_path: Path) -> None:
    config = qkp.QRLoraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(llama(), config)
    move(model)
    model.add_adapter("other", qkp.QRLoraConfig(r=3, target_modules=["v_proj"]))
    model.set_adapter("other")
    move(model, seed=2)
    qk.to_lora(model, tmp_path / "other")
    assert (
        distance(logits(through_peft("llama", tmp_path / "other")), logits(model), logits(llama()))
        < FP32
    )
    qk.to_lora(model, tmp_path / "first", adapter="default")
    model.set_adapter("default")
    assert (
        distance(logits(through_peft("llama", tmp_path / "first")), logits(model), logits(llama()))
        < FP32
    )


@pytest.mark.parametrize("adapter", ["qr", "lora_xs"])
def test_autocast_rounds_nothing(adapter: str, tmp_path: Path) -> None:
    model = adapted("llama", adapter)
    with torch.autocast("cpu", torch.bfloat16):
        qk.to_lora(model, tmp_path / "under")
    qk.to_lora(model, tmp_path / "plain")
    under, plain = (tmp_path / n / "adapter_model.safetensors" for n in ("under", "plain"))
    assert under.read_bytes() == plain.read_bytes()


# --- a bank, a file


def test_an_adapter_of_a_bank(tmp_path: Path) -> None:
    model = adapted("bert")
    bank = qk.AdapterBank(model, 2)
    bank.add("ada", {n: t + 0.2 for n, t in _begin(bank).items()})
    qk.to_lora(bank, tmp_path, adapter="ada")
    with torch.no_grad(), bank.use(["ada"] * 3):
        wanted = logits(model)
    assert_served("bert", tmp_path, wanted)


def _begin(bank: qk.AdapterBank) -> dict[str, torch.Tensor]:
    bank.add("start")
    return bank.state("start")


@forms
def test_a_file_with_its_factors(form: Any, tmp_path: Path) -> None:
    model = adapted("bert", "lora_xs", alpha=6.0)
    qk.save_adapter(qk.scale(model, 0.5), tmp_path / "a.safetensors")
    qk.to_lora(tmp_path / "a.safetensors", tmp_path / "lora", form)
    readers.assert_same(readers.by_peft(tmp_path / "lora"), meant(model))
    assert_served("bert", tmp_path / "lora", logits(model))
