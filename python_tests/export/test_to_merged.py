"""The checkpoint that to_merged writes, through from_pretrained with nothing of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import (
    BASES,
    RANKS,
    adapt,
    adapted,
    bert,
    distance,
    files_in,
    llama,
    logits,
    move,
    refusal,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from saved import base
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import qrlora_kernels as qk
import qrlora_kernels.peft as qkp
from qrlora_kernels import files

Q = "model.layers.0.self_attn.q_proj"
models = pytest.mark.parametrize("name", list(BASES))


def loaded(folder: Path, name: str = "llama", **options: Any) -> Any:
    auto = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values())
    return model.eval()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("adapter", ["qr", "lora_xs"])
@models
def test_it_answers_the_same(name: str, adapter: str, tmp_path: Path) -> None:
    model = adapted(name, adapter)
    wanted = logits(model)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    qk.to_merged(model, tmp_path)
    assert distance(logits(loaded(tmp_path, name)), wanted, logits(BASES[name]())) < 1e-4
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert torch.equal(logits(model), wanted)


@models
def test_it_is_what_save_pretrained_writes(name: str, tmp_path: Path) -> None:
    """Names, numbers and configs of a merged model that its own library writes."""
    model = adapted(name)
    qk.to_merged(model, tmp_path / "ours")
    qk.unload(model).save_pretrained(tmp_path / "theirs")
    assert files_in(tmp_path / "ours") == files_in(tmp_path / "theirs")
    ours, theirs = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    for file in files_in(tmp_path / "ours"):
        if file.endswith(".json"):
            assert (tmp_path / "ours" / file).read_text() == (
                tmp_path / "theirs" / file
            ).read_text()


def test_ohora(tmp_path: Path) -> None:
    model = llama()
    qk.adapt(model, ["q_proj", "down_proj"], "ohora", columns="selected", progress=False)
    move(model)
    qk.to_merged(model, tmp_path)
    assert distance(logits(loaded(tmp_path)), logits(model), logits(llama())) < 1e-4


def test_a_small_update_in_bf16(tmp_path: Path) -> None:
    """Merged weights hold an update of 1e-4 in the mean; PEFT, which rounds before, keeps 6 %."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "hidden_size": 256, "intermediate_size": 9, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes)).bfloat16()
    model.save_pretrained(tmp_path / "base")
    layer = adapt(model, {Q: 16}).get_submodule(Q)
    with torch.no_grad():
        layer.lam.mul_(1e-4 * layer.weight.float().norm() / layer.delta_weight().norm())
        x = torch.randn(2048, 256).bfloat16()
        base = nn.functional.linear(x, layer.weight).double()
        delta = layer.delta_weight().double()

    def gain(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((found * wanted).sum() / wanted.square().sum())

    qk.to_lora(model, tmp_path / "lora")
    qk.to_merged(model, tmp_path / "out")
    merged = loaded(tmp_path / "out").get_submodule(Q).weight.detach()
    assert merged.dtype == torch.bfloat16
    # Rounded to nearest it would be 0.02; the rounding of 65,536 weights is worth 0.08.
    assert gain(merged.double() - layer.weight.double(), delta) == pytest.approx(1.0, abs=0.35)
    by_peft = PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "lora")
    served = by_peft.get_submodule(f"base_model.model.{Q}")
    with torch.no_grad():
        assert gain(layer(x).double() - base, x.double() @ delta.T) == pytest.approx(1, abs=0.02)
        assert gain(served(x).double() - base, x.double() @ delta.T) < 0.1


@pytest.mark.parametrize("merged", [False, True])
def test_a_tied_output_that_was_adapted(merged: bool, tmp_path: Path) -> None:
    model = adapt(llama(tied=True), {Q: 3, "lm_head": 4})
    wanted = logits(model)
    if merged:  # which merge() refuses, since it is tied: layer by layer
        for layer in qk.adapted_layers(model).values():
            layer.merge()
    qk.to_merged(model, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings is False
    assert model.config.tie_word_embeddings is True
    held = weights(tmp_path)
    assert torch.equal(held["model.embed_tokens.weight"], llama(tied=True).lm_head.weight)
    assert not torch.equal(held["model.embed_tokens.weight"], held["lm_head.weight"])
    assert distance(logits(loaded(tmp_path)), wanted, logits(llama(tied=True))) < 1e-4


def test_a_tied_output_that_was_not_adapted(tmp_path: Path) -> None:
    model = adapt(llama(tied=True), {Q: 3})
    qk.to_merged(model, tmp_path)
    assert "lm_head.weight" not in weights(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings is True
    assert distance(logits(loaded(tmp_path)), logits(model), logits(llama(tied=True))) < 1e-4


def test_a_tie_that_loading_would_not_make(tmp_path: Path) -> None:
    model = adapt(llama(), {Q: 3})
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    qk.to_merged(model, tmp_path)
    assert torch.allclose(logits(loaded(tmp_path)), logits(model), atol=1e-5)
    wanted = layers[0].mlp.up_proj.weight
    assert torch.equal(weights(tmp_path)["model.layers.1.mlp.up_proj.weight"], wanted)


def test_several_ties(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model = adapt(T5ForConditionalGeneration(sizes), {"encoder.block.0.layer.0.SelfAttention.q": 2})
    qk.to_merged(model, tmp_path / "ours")
    qk.unload(model).save_pretrained(tmp_path / "theirs")
    assert weights(tmp_path / "ours").keys() == weights(tmp_path / "theirs").keys()


def test_a_model_whose_files_have_another_form(tmp_path: Path) -> None:
    """Experts are one tensor in the model and a tensor each in its files."""
    torch.manual_seed(0)
    sizes = MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = adapt(MixtralForCausalLM(sizes), {Q: 3})
    wanted = logits(model)
    qk.to_merged(model, tmp_path / "ours")
    found = logits(loaded(tmp_path / "ours"))
    assert torch.allclose(found, wanted, atol=1e-5)
    qk.unload(model).save_pretrained(tmp_path / "theirs")
    ours, theirs = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in ours
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


# --- several files


def test_shards_and_their_index(tmp_path: Path) -> None:
    model, largest = adapted("llama"), 20_000
    qk.to_merged(model, tmp_path, max_shard_size=largest)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    sizes = []
    for shard in shards:
        held = load_file(tmp_path / shard)
        assert all(index["weight_map"][name] == shard for name in held)
        sizes.append(sum(t.nbytes for t in held.values()))
    assert max(sizes) <= largest
    assert sum(sizes) == index["metadata"]["total_size"]
    assert distance(logits(loaded(tmp_path)), logits(model), logits(llama())) < 1e-4


def test_memory_holds_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is merged when its file is written, and not before."""
    model, events = adapted("llama"), []
    merge, save = qk.export.merged.merging.merged_parameter, qk.export.merged.save_tensors

    def merging(*arguments: Any) -> Any:
        events.append("merge")
        return merge(*arguments)

    def saving(*arguments: Any) -> None:
        events.append("save")
        save(*arguments)

    monkeypatch.setattr("qrlora_kernels.export.merged.merging.merged_parameter", merging)
    monkeypatch.setattr("qrlora_kernels.export.merged.save_tensors", saving)
    qk.to_merged(model, tmp_path, max_shard_size=5_000)
    assert "merge merge" not in " ".join(events)
    assert events.count("merge") == len(RANKS["llama"])


@pytest.mark.parametrize("sizes", [(20_000, 10**9), (10**9, 20_000), (20_000, 30_000)])
def test_an_earlier_checkpoint_goes(sizes: tuple[int, int], tmp_path: Path) -> None:
    """Its weights would be read in place of the new ones, or lie there for nothing."""
    first, second = adapted("llama"), adapted("llama", "lora_xs")
    qk.to_merged(first, tmp_path, max_shard_size=sizes[0])
    (tmp_path / "tokenizer.json").write_text("{}")
    qk.to_merged(second, tmp_path, max_shard_size=sizes[1])
    assert distance(logits(loaded(tmp_path)), logits(second), logits(llama())) < 1e-4
    qk.to_merged(second, tmp_path / "alone", max_shard_size=sizes[1])
    left = [name for name in files_in(tmp_path) if name not in ("alone", "tokenizer.json")]
    assert left == files_in(tmp_path / "alone")
    assert (tmp_path / "tokenizer.json").exists()


def test_a_failure_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("llama")
    qk.to_merged(model, tmp_path)
    before = weights(tmp_path)
    count = iter(range(10))

    def full(*arguments: Any) -> None:
        if next(count) == 2:
            raise OSError(28, "No space left on device")
        files.save_tensors(*arguments)

    monkeypatch.setattr("qrlora_kernels.export.merged.save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        qk.to_merged(adapted("llama", "lora_xs"), tmp_path, max_shard_size=20_000)
    assert files_in(tmp_path) == ["config.json", "generation_config.json", "model.safetensors"]
    assert all(torch.equal(before[n], t) for n, t in weights(tmp_path).items())


# --- what trained beside, strength


def test_what_only_a_checkpoint_can_hold(tmp_path: Path) -> None:
    """The bias of an adapted layer, which to_lora refuses."""
    model = adapted("bert")
    bias = model.bert.encoder.layer[0].attention.self.query.bias
    bias.requires_grad_(True)
    with torch.no_grad():
        bias.add_(0.5)
    qk.to_merged(model, tmp_path)
    assert distance(logits(loaded(tmp_path, "bert")), logits(model), logits(bert())) < 1e-4


@pytest.mark.parametrize("strength", [0.5, 0.0])
def test_the_strength_counts(strength: float, tmp_path: Path) -> None:
    model = qk.scale(adapted("llama"), strength)
    qk.to_merged(model, tmp_path)
    assert torch.allclose(logits(loaded(tmp_path)), logits(model), atol=1e-5)
    if not strength:
        assert torch.equal(logits(loaded(tmp_path)), logits(llama()))


def test_a_merged_and_compiled_model(tmp_path: Path) -> None:
    model = qk.merge(adapted("llama"))
    qk.to_merged(torch.compile(model), tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), logits(model))


# --- refusals


def refused(folder: Path, model: Any, **options: Any) -> str:
    said = refusal(lambda: qk.to_merged(model, folder, **options))
    assert said
    assert files_in(folder) == []
    return said


def test_models_that_cannot_be_written(tmp_path: Path) -> None:
    assert "model must hold adapted layers" in refused(tmp_path, llama())
    assert "model must be an nn.Module" in refused(tmp_path, "llama")
    said = refused(tmp_path, adapt(base(), {"0": 2}))
    assert "config of transformers, got Sequential without" in said
    under_peft = get_peft_model(llama(), qkp.QRLoraConfig(r=2, target_modules=["q_proj"]))
    assert "merge_and_unload().save_pretrained" in refused(tmp_path, under_peft)
    model = adapted("llama")
    with qk.disabled(model):
        assert "to_merged needs adapters that are on" in refused(tmp_path, model)


@pytest.mark.parametrize("value", [0, -1, 2.5, "5GB"])
def test_wrong_sizes_of_a_file(value: Any, tmp_path: Path) -> None:
    assert "max_shard_size must be" in refused(tmp_path, adapted("llama"), max_shard_size=value)


def test_a_weight_that_is_computed_anew(tmp_path: Path) -> None:
    model = adapted("llama")
    layer = model.model.layers[0].self_attn.q_proj
    nn.utils.parametrizations.weight_norm(layer)
    assert refused(tmp_path, model).startswith(f"{Q}: weight must be a parameter")


def test_a_merged_weight_that_is_not_finite(tmp_path: Path) -> None:
    model = adapted("llama")
    with torch.no_grad():
        qk.adapted_layers(model)[Q].lam.fill_(float("inf"))
    assert refused(tmp_path, model).startswith(f"{Q}: W + ΔW must be finite")


def test_a_model_that_says_it_is_quantised(tmp_path: Path) -> None:
    """from_pretrained would read plain weights as quantised ones."""
    model = adapted("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert "got a quantization_config in its config" in refused(tmp_path, model)


def test_a_sparse_buffer(tmp_path: Path) -> None:
    model = adapted("llama")
    model.register_buffer("graph", torch.eye(3).to_sparse())
    assert refused(tmp_path, model).startswith("graph must be dense to be written")
    model.register_buffer("graph", torch.eye(3).to_sparse(), persistent=False)
    qk.to_merged(model, tmp_path)
    assert "graph" not in weights(tmp_path)


def test_a_model_without_generation_settings(tmp_path: Path) -> None:
    model = adapted("llama")
    model.generation_config = None
    qk.to_merged(model, tmp_path)
    assert files_in(tmp_path) == ["config.json", "model.safetensors"]


def test_settings_are_refused_before_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers takes no such pair, which was found after hours of writing."""
    model = adapted("llama")
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    monkeypatch.setattr("qrlora_kernels.export.merged.save_tensors", lambda *_: pytest.fail("late"))
    assert "temperature" in refused(tmp_path, model)


def test_a_folder_that_holds_an_adapter(tmp_path: Path) -> None:
    model = adapted("llama")
    qk.to_lora(model, tmp_path)
    said = refusal(lambda: qk.to_merged(model, tmp_path))
    assert "with adapter_config.json: loaders would mix the two" in said
    file = tmp_path / "adapter_config.json"
    with pytest.raises(NotADirectoryError):
        qk.to_merged(model, file)
