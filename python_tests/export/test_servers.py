"""What each server would refuse or misread is refused before a file is written, by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import readers
import torch
from exported import BASES, RANKS, adapt, adapted, files_in, gpt2, llama, meant, move, refusal
from saved import base
from torch import nn

import qrlora_kernels as qk

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def refused(folder: Path, *arguments: Any, **options: Any) -> str:
    """What to_lora says; it must have written nothing."""
    said = refusal(lambda: qk.to_lora(*arguments, **options))
    assert said
    assert files_in(folder) == []
    return said


@pytest.mark.parametrize("server", ["peft", "vllm", "sglang", "llama.cpp"])
def test_a_plain_adapter_suits_every_server(server: Any, tmp_path: Path) -> None:
    model = adapt(llama(), {Q: 3, V: 5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="the base's name")
        qk.to_lora(model, tmp_path, for_=server)
    for read in (readers.by_peft, readers.by_vllm, readers.by_sglang, readers.by_llama_cpp):
        readers.assert_same(read(tmp_path), meant(model))


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama.cpp"])
def test_conv1d(server: Any, tmp_path: Path) -> None:
    model = adapt(gpt2(), {"transformer.h.0.attn.c_proj": 3})
    said = refused(tmp_path, model, tmp_path, for_=server)
    assert "transformer.h.0.attn.c_proj is a Conv1D" in said
    assert "to_merged" in said


@pytest.mark.parametrize("server", ["sglang", "llama.cpp"])
def test_pattern(server: Any, tmp_path: Path) -> None:
    said = refused(tmp_path, adapt(llama(), {Q: 3, V: 5}), tmp_path, "pattern", server)
    assert "form must be 'padded'" in said


@pytest.mark.parametrize("server", ["sglang", "llama.cpp"])
def test_heads(server: Any, tmp_path: Path) -> None:
    model = adapt(llama(), {Q: 3, V: 5}, trainable=["lm_head"])
    assert "lm_head trained in full" in refused(tmp_path, model, tmp_path, for_=server)


# --- vLLM


def of_rank(rank: int, width: int = 640) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width))
    qk.adapt(model, ["0"], "lora_xs", rank=rank, basis="random", progress=False)
    move(model)
    return model


def test_vllm_is_told_its_rank(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="--max-lora-rank 32") as told:
        qk.to_lora(of_rank(17, 32), tmp_path, for_="vllm")
    assert told[0].filename == __file__
    with pytest.raises(ValueError, match="max_lora_rank"):
        readers.by_vllm(tmp_path)
    readers.by_vllm(tmp_path, 32)


def test_vllm_refuses_ranks_over_512(tmp_path: Path) -> None:
    said = refused(tmp_path, of_rank(513), tmp_path, for_="vllm")
    assert "got 513 in 0: give truncate=512" in said
    with pytest.warns(UserWarning, match="relative error"):
        qk.to_lora(of_rank(513), tmp_path, for_="vllm", truncate=512)


def test_vllm_takes_a_classifier(tmp_path: Path) -> None:
    model = adapted("bert")
    with pytest.warns(UserWarning, match=r"the head classifier from its release 0\.31"):
        qk.to_lora(model, tmp_path, for_="vllm")
    readers.assert_same(readers.by_vllm(tmp_path), meant(model))


@pytest.mark.parametrize("trainable", [["pooler.dense"], ["classifier", "pooler.dense"]])
def test_vllm_refuses_other_heads(trainable: list[str], tmp_path: Path) -> None:
    model = adapted("bert", trainable=trainable)
    said = refused(tmp_path, model, tmp_path, for_="vllm")
    assert "vLLM takes one head" in said
    assert "bert.pooler" in said


def test_vllm_refuses_a_head_of_several_layers(tmp_path: Path) -> None:
    model = nn.Module()
    model.query = nn.Linear(8, 8)
    model.classifier = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    adapt(model, {"query": 2}, trainable=["classifier"])
    assert "heads of one layer" in refused(tmp_path, model, tmp_path, for_="vllm")


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        for _ in range(2):
            expert = nn.Module()
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(expert, name, nn.Linear(8, 8))
            self.experts.append(expert)


def experts(**ranks: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.mlp = Experts()
    named = {f"mlp.experts.{i}.{name}": rank + i for name, rank in ranks.items() for i in range(2)}
    return adapt(model, named)


def test_vllm_needs_all_of_an_expert(tmp_path: Path) -> None:
    said = refused(tmp_path, experts(gate_proj=2, up_proj=2), tmp_path, for_="vllm")
    assert "got none of down" in said
    assert "mlp.experts." in said


def test_vllm_needs_one_rank_over_experts(tmp_path: Path) -> None:
    model = experts(gate_proj=2, up_proj=2, down_proj=2)
    assert "form='padded'" in refused(tmp_path, model, tmp_path, "pattern", "vllm")
    qk.to_lora(model, tmp_path, for_="vllm")


def test_vllm_refuses_a_large_vocabulary(tmp_path: Path) -> None:
    model = nn.Module()
    model.lm_head = nn.Linear(2, 258_049, bias=False)
    adapt(model, {"lm_head": 1})
    assert "258048 words, got 258049 in lm_head" in refused(tmp_path, model, tmp_path, for_="vllm")


# --- SGLang

IN_LAYER = "model.layers.0."


@pytest.mark.parametrize(
    ("there", "added"),
    [
        ("self_attn.q_proj", ["self_attn.v_proj"]),
        ("self_attn.v_proj", ["self_attn.q_proj"]),
        ("self_attn.k_proj", ["self_attn.q_proj", "self_attn.v_proj"]),
        ("mlp.up_proj", ["mlp.gate_proj"]),
        ("mlp.gate_proj", []),
        ("self_attn.o_proj", []),
    ],
)
def test_sglang_gets_the_zeros_it_needs(there: str, added: list[str], tmp_path: Path) -> None:
    model = adapt(llama(), {f"{IN_LAYER}{there}": 3})
    qk.to_lora(model, tmp_path / "plain")
    if added:
        with pytest.raises(KeyError):
            readers.by_sglang(tmp_path / "plain")
    qk.to_lora(model, tmp_path / "sglang", for_="sglang")
    found = readers.by_sglang(tmp_path / "sglang")
    assert set(found) == {f"{IN_LAYER}{name}" for name in (there, *added)}
    readers.assert_same(found, meant(model))


def test_an_mlp_without_a_gate(tmp_path: Path) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].up_proj = nn.Linear(8, 8)
    qk.to_lora(adapt(model, {"layers.0.up_proj": 2}), tmp_path, for_="sglang")
    assert set(readers.pairs(tmp_path)) == {"layers.0.up_proj"}


def test_sglang_refuses_what_it_would_drop(tmp_path: Path) -> None:
    model = adapt(BASES["bert"](), RANKS["bert"])
    said = refused(tmp_path, model, tmp_path, for_="sglang")
    assert "bert.encoder.layer.0.attention.self.query" in said
    model = adapt(llama(), {Q: 2, V: 2, "lm_head": 3})
    qk.to_lora(model, tmp_path, for_="sglang")
    assert "lm_head" in readers.config(tmp_path)["target_modules"]


def test_sglang_reads_every_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    model = adapt(llama(), {Q: 2, V: 2})
    assert "model.safetensors" in refusal(lambda: qk.to_lora(model, tmp_path, for_="sglang"))
    assert files_in(tmp_path) == ["model.safetensors"]


def test_a_file_knows_no_shapes_of_other_layers(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    qk.save_adapter(adapt(llama(), {Q: 2}), file, factors="stored")
    said = refusal(lambda: qk.to_lora(file, tmp_path / "lora", for_="sglang"))
    assert "give the model in place of the file" in said


# --- llama.cpp


def test_a_file_does_not_know_whether_the_output_is_tied(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    qk.save_adapter(adapt(llama(), {"lm_head": 2}), file, factors="stored")
    said = refusal(lambda: qk.to_lora(file, tmp_path / "lora", for_="llama.cpp"))
    assert "only the model knows whether its output is tied" in said


def test_llama_cpp_has_no_tied_output(tmp_path: Path) -> None:
    model = adapt(llama(tied=True), {Q: 2, "lm_head": 3})
    assert "no tensor for lm_head" in refused(tmp_path, model, tmp_path, for_="llama.cpp")
    qk.to_lora(model, tmp_path / "peft", for_="peft")
    untied = adapt(llama(), {Q: 2, "lm_head": 3})
    qk.to_lora(untied, tmp_path / "llama.cpp", for_="llama.cpp")
    readers.assert_same(readers.by_llama_cpp(tmp_path / "llama.cpp"), meant(untied))


def test_llama_cpp_asks_for_the_base(tmp_path: Path) -> None:
    model = adapt(llama(), {Q: 2})
    with pytest.warns(UserWarning, match="--base"):
        qk.to_lora(model, tmp_path, for_="llama.cpp")
    model.config._name_or_path = "some/base"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qk.to_lora(model, tmp_path, for_="llama.cpp")
    assert readers.config(tmp_path)["base_model_name_or_path"] == "some/base"


# --- whatever the server


def test_ohora_offers_two_ways(tmp_path: Path) -> None:
    model = llama()
    qk.adapt(model, ["q_proj"], "ohora", columns="selected", progress=False)
    said = refused(tmp_path, model, tmp_path)
    assert said.startswith(f"{Q} has an update of OHoRA")
    assert "to_merged" in said
    assert "truncate=R" in said


def test_a_trained_bias(tmp_path: Path) -> None:
    model = adapted("bert")
    model.bert.encoder.layer[0].attention.self.query.bias.requires_grad_(True)
    said = refused(tmp_path, model, tmp_path)
    assert "bert.encoder.layer.0.attention.self.query.bias was trained in full" in said
    assert "to_merged" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(value: float, tmp_path: Path) -> None:
    model = adapt(llama(), {Q: 2, V: 2})
    with torch.no_grad():
        qk.adapted_layers(model)[V].lam[0] = value
    assert refused(tmp_path, model, tmp_path).startswith(f"{V} must have a finite update")


@pytest.mark.parametrize("size", [1e-7, 1e7])
def test_numbers_out_of_the_range_of_fp16(size: float, tmp_path: Path) -> None:
    model = adapt(llama(), {Q: 2})
    nn.init.constant_(qk.adapted_layers(model)[Q].lam, size)
    said = refused(tmp_path, model, tmp_path, dtype=torch.float16)
    assert Q in said
    assert "take torch.float32" in said
    qk.to_lora(model, tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "wide"}, "form must be one of padded, pattern, got 'wide'"),
        ({"for_": "ollama"}, "for_ must be one of peft, vllm, sglang, llama.cpp, got 'ollama'"),
        ({"dtype": torch.int8}, "dtype must be None or one of"),
        ({"dtype": torch.float64}, "dtype must be None or one of"),
        ({"truncate": 0}, "truncate must be None or at least 1, got 0"),
        ({"truncate": 2.5}, "truncate must be an int"),
        ({"adapter": "ada"}, "adapter must be None for a model that adapt made"),
        ({"adapter": 3}, "adapter must be a name, got int"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, adapt(llama(), {Q: 2}), tmp_path, **options)


def test_wrong_models(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    assert "model must hold adapted layers" in refused(folder, llama(), folder)
    assert "model must be an nn.Module" in refused(folder, 3, folder)
    with pytest.raises(FileNotFoundError):
        qk.to_lora(tmp_path / "none.safetensors", folder)
    file = tmp_path / "a.safetensors"
    qk.save_adapter(adapt(llama(), {Q: 2}), file)
    said = refused(folder, file, folder)
    assert f"rebuilds the factors of {Q}" in said
    assert "factors='stored'" in said
    with pytest.raises(NotADirectoryError):
        qk.to_lora(adapt(llama(), {Q: 2}), file)
    bank = qk.AdapterBank(adapt(llama(), {Q: 2}), 2)
    assert "adapter must name one of the bank" in refused(folder, bank, folder)
    with pytest.raises((KeyError, ValueError), match="nobody"):
        qk.to_lora(bank, folder, adapter="nobody")


def test_a_failure_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = adapt(llama(), {Q: 2}), adapt(llama(), {V: 3})
    qk.to_lora(first, tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qrlora_kernels.export.lora.write_text", full)
    with pytest.raises(OSError, match="No space left"):
        qk.to_lora(second, tmp_path)
    with pytest.raises(OSError, match="No space left"):
        qk.to_lora(second, tmp_path / "new")
    assert files_in(tmp_path) == ["adapter_config.json", "adapter_model.safetensors"]
    readers.assert_same(readers.by_peft(tmp_path), meant(first))


def test_a_module_that_is_used_twice(tmp_path: Path) -> None:
    model = base()
    model.append(model[0])
    assert "0 and 4 are one module" in refused(tmp_path, adapt(model, {"0": 2}), tmp_path)
