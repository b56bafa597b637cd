"""What trained in full beside the adapters, and names that loaders take for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import readers
import torch
from exported import BASES, RANKS, adapt, adapted, distance, files_in, llama, logits, move, refusal
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import qrlora_kernels as qk
import qrlora_kernels.peft as qkp

Q = "model.layers.0.self_attn.q_proj"


def served(model: nn.Module, folder: Path, base: nn.Module) -> nn.Module:
    qk.to_lora(model, folder)
    return PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_that_a_file_brought(frozen: bool, tmp_path: Path) -> None:
    """Whether it still trains or not."""
    trained = adapted("bert")
    qk.save_adapter(trained, tmp_path / "a.safetensors")
    model = qk.load_adapter(BASES["bert"](), tmp_path / "a.safetensors")
    if frozen:
        model.requires_grad_(False)
    answer = logits(served(model, tmp_path / "lora", BASES["bert"]()))
    assert distance(answer, logits(trained), logits(BASES["bert"]())) < 1e-4


def test_what_trains_is_saved_as_the_largest_modules(tmp_path: Path) -> None:
    names = ["classifier", "pooler", "attention.output.LayerNorm", "layer.0.intermediate"]
    model = adapted("bert", trainable=names)
    answer = logits(served(model, tmp_path, BASES["bert"]()))
    assert readers.config(tmp_path)["modules_to_save"] == [
        "bert.encoder.layer.0.attention.output.LayerNorm",
        "bert.encoder.layer.0.intermediate",
        "bert.encoder.layer.1.attention.output.LayerNorm",
        "bert.pooler",
        "classifier",
    ]
    assert distance(answer, logits(model), logits(BASES["bert"]())) < 1e-4


def test_a_part_of_a_module_goes_with_the_rest_of_it(tmp_path: Path) -> None:
    model = adapted("bert", trainable=[])
    model.classifier.bias.requires_grad_(True)
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    answer = logits(served(model, tmp_path, BASES["bert"]()))
    assert distance(answer, logits(model), logits(BASES["bert"]())) < 1e-4


def test_a_part_of_a_module_in_a_file(tmp_path: Path) -> None:
    """PEFT would end in a KeyError for the rest, which only the model has."""
    model = adapted("bert", "lora_xs", trainable=[])
    model.classifier.bias.requires_grad_(True)
    qk.save_adapter(model, tmp_path / "a.safetensors")
    said = refusal(lambda: qk.to_lora(tmp_path / "a.safetensors", tmp_path / "lora"))
    assert "holds a part of a module, without classifier.weight" in said
    assert files_in(tmp_path / "lora") == []


def test_a_bias_in_a_file(tmp_path: Path) -> None:
    model = adapted("bert", "lora_xs")
    model.bert.encoder.layer[0].attention.self.query.bias.requires_grad_(True)
    qk.save_adapter(model, tmp_path / "a.safetensors")
    said = refusal(lambda: qk.to_lora(tmp_path / "a.safetensors", tmp_path / "lora"))
    assert "query.bias, and no LoRA file holds a parameter" in said


def test_a_changed_base_in_a_file_is_told(tmp_path: Path) -> None:
    model = adapt(llama(), {Q: 2}, "lora_xs")
    with torch.no_grad():
        model.get_submodule(Q).weight.add_(0.01)
    with pytest.warns(UserWarning, match="changed after their adapters began"):
        qk.save_adapter(model, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=f"base weights of {Q} were changed") as told:
        qk.to_lora(tmp_path / "a.safetensors", tmp_path / "lora")
    assert told[0].filename == __file__


def test_a_tied_embedding_that_trains(tmp_path: Path) -> None:
    """Both of its names are written: PEFT gives each wrapped module a copy."""
    model = adapt(llama(tied=True), {Q: 3}, trainable=["embed_tokens"])
    answer = logits(served(model, tmp_path, llama(tied=True)))
    assert readers.config(tmp_path)["modules_to_save"] == ["model.embed_tokens", "lm_head"]
    assert distance(answer, logits(model), logits(llama(tied=True))) < 1e-4


def test_a_head_over_half_precision_keeps_fp32(tmp_path: Path) -> None:
    model = adapted("bert", dtype=torch.bfloat16)
    qk.to_lora(model, tmp_path)
    held = readers.tensors(tmp_path)["base_model.model.classifier.weight"]
    assert held.dtype == torch.float32
    assert torch.equal(held, model.classifier.weight)


def test_running_statistics_are_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    adapt(model, {"0": 2})
    with pytest.warns(UserWarning, match=r"no LoRA file holds running statistics, got 1\.running"):
        qk.to_lora(model, tmp_path)


# --- names that are the end of others


class Namesakes(nn.Module):
    """Layers and heads whose names end alike; a plain module takes no config."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(8, 8)
        self.block = nn.Module()
        self.block.lin = nn.Linear(8, 8)
        self.pre_score = nn.Linear(8, 8)
        self.score = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.pre_score(self.block.lin(self.lin(x).tanh()).tanh()))


@torch.no_grad()
def answer(model: nn.Module) -> torch.Tensor:
    return model.eval()(torch.randn(5, 8, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("form", ["padded", "pattern"])
@pytest.mark.parametrize(
    "ranks", [{"lin": 2}, {"lin": 2, "block.lin": 5}, {"lin": 5, "block.lin": 2}]
)
def test_layers_whose_names_end_alike(ranks: dict[str, int], form: Any, tmp_path: Path) -> None:
    model = adapt(Namesakes(), ranks, trainable=["score"])
    qk.to_lora(model, tmp_path, form)
    loaded = PeftModel.from_pretrained(Namesakes(), tmp_path)
    wrapped = {n for n, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert wrapped == {f"base_model.model.{name}" for name in ranks}
    assert torch.allclose(answer(loaded), answer(model), atol=1e-6)


def test_a_head_whose_name_ends_another(tmp_path: Path) -> None:
    """PEFT wraps both and would end in a KeyError for what the file lacks."""
    model = adapt(Namesakes(), {"lin": 2}, trainable=["score"])
    loaded = served(model, tmp_path, Namesakes())
    assert readers.config(tmp_path)["modules_to_save"] == ["score", "pre_score"]
    assert torch.allclose(answer(loaded), answer(model), atol=1e-6)


def test_a_head_whose_name_ends_an_adapted_layer(tmp_path: Path) -> None:
    model = adapt(Namesakes(), {"pre_score": 2}, trainable=["score"])
    said = refusal(lambda: qk.to_lora(model, tmp_path))
    assert "loaders would take pre_score for a head" in said
    assert files_in(tmp_path) == []


# --- under PEFT


def under_peft(**options: Any) -> Any:
    config = qkp.QRLoraConfig(**({"r": 3, "target_modules": ["query"]} | options))
    model = get_peft_model(BASES["bert"](), config)
    move(model)
    return model


def test_a_bias_under_peft(tmp_path: Path) -> None:
    said = refusal(lambda: qk.to_lora(under_peft(bias="all"), tmp_path))
    assert "bias was trained in full" in said
    assert files_in(tmp_path) == []


def test_single_tokens_under_peft(tmp_path: Path) -> None:
    model = under_peft(trainable_token_indices={"word_embeddings": [3]})
    said = refusal(lambda: qk.to_lora(model, tmp_path))
    assert "word_embeddings trains single tokens" in said


def test_a_parameter_that_the_user_trains_under_peft(tmp_path: Path) -> None:
    model = under_peft()
    model.base_model.model.bert.pooler.requires_grad_(True)
    move(model)
    found = logits(served(model, tmp_path, BASES["bert"]()))
    assert distance(found, logits(model), logits(BASES["bert"]())) < 1e-4


def test_names_of_adapters_under_peft(tmp_path: Path) -> None:
    model = under_peft()
    said = refusal(lambda: qk.to_lora(model, tmp_path, adapter="nobody"))
    assert said == "adapter must be one of ['default'], got 'nobody'"
    model.add_adapter("other", qkp.QRLoraConfig(r=2, target_modules=["value"]))
    model.base_model.set_adapter(["default", "other"])
    said = refusal(lambda: qk.to_lora(model, tmp_path))
    assert "adapter must name one" in said
    assert "['default', 'other']" in said


def test_a_merged_model_under_peft(tmp_path: Path) -> None:
    model = under_peft()
    qk.to_lora(model, tmp_path / "before")
    model.merge_adapter()
    qk.to_lora(model, tmp_path / "merged")
    for name, tensor in readers.tensors(tmp_path / "before").items():
        assert torch.equal(readers.tensors(tmp_path / "merged")[name], tensor)


def test_an_adapter_of_another_method(tmp_path: Path) -> None:
    model = adapt(llama(), {Q: 2})
    said = refusal(lambda: qk.to_lora(get_peft_model(llama(), LoraConfig()), tmp_path))
    assert "model must hold adapted layers" in said
    get_peft_model(model, LoraConfig(target_modules=["v_proj"]))
    said = refusal(lambda: qk.to_lora(model, tmp_path))
    assert "adapters of this package alone" in said
    assert files_in(tmp_path) == []


def test_a_bank_under_peft(tmp_path: Path) -> None:
    model = under_peft(modules_to_save=["classifier"])
    bank = qk.AdapterBank(model, 2)
    bank.add("start")
    bank.add("ada", {n: t + 0.2 for n, t in bank.state("start").items()})
    qk.to_lora(bank, tmp_path, adapter="ada")
    with torch.no_grad(), bank.use(["ada"] * 3):
        wanted = logits(model)
    loaded = PeftModel.from_pretrained(BASES["bert"](), tmp_path)
    assert distance(logits(loaded), wanted, logits(BASES["bert"]())) < 1e-4


def test_an_injected_model(tmp_path: Path) -> None:
    """As ``inject_adapter_in_model`` leaves it: no PeftModel around."""
    model = under_peft()
    wanted = logits(model)
    found = logits(served(model.base_model.model, tmp_path, BASES["bert"]()))
    assert distance(found, wanted, logits(BASES["bert"]())) < 1e-4


def test_uneven_ranks_are_in_the_fixtures() -> None:
    assert all(len(set(ranks.values())) == len(ranks) for ranks in RANKS.values())


def test_a_sparse_buffer_in_a_head(tmp_path: Path) -> None:
    model = adapted("bert")
    model.classifier.register_buffer("graph", torch.eye(3).to_sparse())
    said = refusal(lambda: qk.to_lora(model, tmp_path))
    assert said.startswith("classifier.graph must be dense to be written")
    assert files_in(tmp_path) == []
