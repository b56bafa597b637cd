"""Checkpoints in the layout of LoRA-XS's authors, written here and read back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import BASES, bert, distance, llama, logits, move, refusal
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels.nn.base_weight import is_conv1d

RANK, ALPHA = 4, 16
TARGETS = {
    "llama": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_proj"],
    "bert": ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"],
}
OLD, NEW = "{}_lora_latent_mapping.weight", "{}.default_lora_latent_mapping.weight"
Q = TARGETS["bert"][0]


def matrix(layer: Any) -> Tensor:
    weight = layer.weight.detach()
    return weight.t() if is_conv1d(layer) else weight


def tensors_of(model: nn.Module, names: list[str], latent: str = OLD) -> dict[str, Tensor]:
    """As the authors' code makes them: Σ in lora_A, and signs that are nobody's."""
    generator = torch.Generator().manual_seed(7)
    made: dict[str, Tensor] = {}
    for name in names:
        weight = matrix(model.get_submodule(name)).float()
        u = torch.linalg.svd(weight)[0][:, :RANK]
        b = u * torch.randn(RANK, generator=generator).sign()
        made[f"base_model.model.{name}.lora_A.weight"] = (b.mT @ weight).contiguous()
        made[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
        r = 0.2 * torch.randn(RANK, RANK, generator=generator)
        made[f"base_model.model.{latent.format(name)}"] = r
    return made


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def by_hand(model: nn.Module, tensors: dict[str, Tensor], latent: str = OLD) -> nn.Module:
    """The base with s · lora_B R lora_A in its weights, and with the head."""
    model = copy.deepcopy(model)
    names = [n[len("base_model.model.") : -len(".lora_A.weight")] for n in tensors if "lora_A" in n]
    with torch.no_grad():
        for name in names:
            a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            delta = ALPHA / RANK * b @ tensors[f"base_model.model.{latent.format(name)}"] @ a
            matrix(model.get_submodule(name)).add_(delta)
        for key, tensor in tensors.items():
            if "classifier" in key:
                model.get_parameter(key.removeprefix("base_model.model.")).copy_(tensor)
    return model


@pytest.mark.parametrize("latent", [OLD, NEW])
@pytest.mark.parametrize("name", list(BASES))
def test_it_answers_as_the_formula(name: str, latent: str, tmp_path: Path) -> None:
    base = BASES[name]()
    tensors = tensors_of(base, TARGETS[name], latent)
    if name == "bert":
        head = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
        tensors["base_model.model.classifier.weight"] = head
    wanted = logits(by_hand(base, tensors, latent))
    model = qk.from_lora_xs(BASES[name](), write(tmp_path, tensors))
    assert set(qk.adapted_layers(model)) == set(TARGETS[name])
    assert distance(logits(model), wanted, logits(base)) < 1e-4
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    head_trains = {"classifier.weight"} if name == "bert" else set()
    assert trains == {f"{target}.core" for target in TARGETS[name]} | head_trains


def test_the_factors_are_the_files(tmp_path: Path) -> None:
    tensors = tensors_of(bert(), [Q])
    model = qk.from_lora_xs(bert(), write(tmp_path, tensors, lora_dropout=0.25))
    layer = qk.adapted_layers(model)[Q]
    assert isinstance(layer, qk.LoRAXSLinear)
    assert torch.equal(layer.a, tensors[f"base_model.model.{Q}.lora_A.weight"])
    assert torch.equal(layer.b, tensors[f"base_model.model.{Q}.lora_B.weight"])
    assert torch.equal(layer.core, tensors[f"base_model.model.{Q}_lora_latent_mapping.weight"].T)
    assert (layer.scaling, layer.options.dropout) == (ALPHA / RANK, 0.25)


def test_it_goes_on_as_an_adapter_of_ours(tmp_path: Path) -> None:
    """Trained further, saved and loaded here, and out again as plain LoRA."""
    tensors = tensors_of(bert(), TARGETS["bert"])
    tensors["base_model.model.classifier.bias"] = torch.ones(3)
    model = qk.from_lora_xs(bert(), write(tmp_path / "theirs", tensors))
    move(model)
    qk.save_adapter(model, tmp_path / "ours.safetensors")
    again = qk.load_adapter(bert(), tmp_path / "ours.safetensors")
    assert torch.equal(logits(again), logits(model))
    for form in ("padded", "pattern"):
        qk.to_lora(again, tmp_path / form, form)  # type: ignore[arg-type]
        plain = PeftModel.from_pretrained(bert(), tmp_path / form)
        assert distance(logits(plain), logits(model), logits(bert())) < 1e-4
    plainly = PeftModel.from_pretrained(bert(), tmp_path / "theirs")
    wanted = logits(by_hand(bert(), tensors))
    assert distance(logits(plainly), wanted, logits(bert())) > 0.1  # which drops R without a word


def test_a_bin_file(tmp_path: Path) -> None:
    tensors = tensors_of(bert(), [Q])
    write(tmp_path, tensors)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    model = qk.from_lora_xs(bert(), tmp_path)
    assert distance(logits(model), logits(by_hand(bert(), tensors)), logits(bert())) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_in_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Factors in the weight's dtype, what trains in fp32 or wider."""
    tensors = tensors_of(llama(), TARGETS["llama"])
    model = qk.from_lora_xs(llama().to(dtype), write(tmp_path, tensors))
    layer = qk.adapted_layers(model)[TARGETS["llama"][0]]
    assert (layer.a.dtype, layer.b.dtype) == (dtype, dtype)
    assert layer.core.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = logits(by_hand(llama(), tensors))
    bound = 1e-4 if dtype == torch.float64 else 0.1
    assert distance(logits(model).float(), wanted, logits(llama())) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {n: t.to(dtype) for n, t in tensors_of(llama(), TARGETS["llama"]).items()}
    model = qk.from_lora_xs(llama(), write(tmp_path, tensors))
    wide = {n: t.float() for n, t in tensors.items()}
    assert distance(logits(model), logits(by_hand(llama(), wide)), logits(llama())) < 1e-4


def test_factors_of_no_weight_are_not_checked(tmp_path: Path) -> None:
    """As the authors' own config says, one folder up."""
    tensors = tensors_of(bert(), [Q])
    tensors[f"base_model.model.{Q}.lora_A.weight"] = torch.randn(RANK, 32)
    folder = write(tmp_path / "best", tensors)
    assert "is not the weight" in refusal(lambda: qk.from_lora_xs(bert(), folder))
    config = tmp_path / "reconstr_config.json"
    config.write_text('{"replacement_module_random_init": false}')
    assert "is not the weight" in refusal(lambda: qk.from_lora_xs(bert(), folder))
    config.write_text('{"replacement_module_random_init": true}')
    model = qk.from_lora_xs(bert(), folder)
    assert distance(logits(model), logits(by_hand(bert(), tensors)), logits(bert())) < 1e-4


# --- another base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_base(dtype: torch.dtype, tmp_path: Path) -> None:
    base = bert()
    with torch.no_grad():
        noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
        weight = base.get_submodule(Q).weight
        weight.add_(0.05 * weight.norm() / noise.norm() * noise)
    folder = write(tmp_path, tensors_of(bert(), [Q]))
    base = base.to(dtype)
    before = {n: p.clone() for n, p in base.state_dict().items()}
    said = refusal(lambda: qk.from_lora_xs(base, folder))
    assert f"{Q}.weight is not the weight that the checkpoint was trained over" in said
    assert "lora_A must be lora_B^T W" in said
    assert not list(qk.adapted_layers(base))
    assert all(torch.equal(p, before[n]) for n, p in base.state_dict().items())


def test_a_base_that_is_off_by_1e_4_in_fp32(tmp_path: Path) -> None:
    base = bert()
    with torch.no_grad():
        base.get_submodule(Q).weight.mul_(1 + 1e-4)
    folder = write(tmp_path, tensors_of(bert(), [Q]))
    assert "is not the weight" in refusal(lambda: qk.from_lora_xs(base, folder))


# --- what is no such checkpoint


def without(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[next(name for name in tensors if part in name)]

    return change


def with_(part: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = next((name for name in tensors if part in name), f"base_model.model.{part}")
        tensors[name] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("latent"), f"lacks lora mapping of {TARGETS['bert'][0]}"),
        (without("lora_A"), f"lacks lora A of {TARGETS['bert'][0]}"),
        (with_("lora_A", torch.randn(5, 32)), "with shape [4, 'K'], got [5, 32]"),
        (with_("lora_A", torch.randn(4)), "with shape [4, 'K'], got [4]"),
        (with_("lora_B", torch.randn(16, 4)), "must have shape [16, 32], got [32, 32]"),
        (with_("latent", torch.randn(4, 5)), "with shape [4, 4], got [4, 5]"),
        (with_("latent", torch.full((4, 4), float("nan"))), "must hold finite numbers in lora map"),
        (with_("latent", torch.ones(4, 4, dtype=torch.int8)), "must hold finite numbers in lora"),
        (with_("score.weight", torch.randn(3, 32)), "model must have a parameter score.weight"),
        (with_("classifier.weight", torch.randn(5, 32)), "parameter classifier.weight of shape"),
        (with_("classifier.bias", torch.full((3,), torch.inf)), "NaN or infinite numbers"),
    ],
)
def test_damaged_tensors(change: Any, said: str, tmp_path: Path) -> None:
    tensors = tensors_of(bert(), TARGETS["bert"])
    change(tensors)
    model = bert()
    assert said in refusal(lambda: qk.from_lora_xs(model, write(tmp_path, tensors)))
    assert not qk.adapted_layers(model)


def test_an_ordinary_lora(tmp_path: Path) -> None:
    tensors = {n: t for n, t in tensors_of(bert(), [Q]).items() if "latent" not in n}
    said = refusal(lambda: qk.from_lora_xs(bert(), write(tmp_path, tensors)))
    assert "it is an ordinary LoRA checkpoint, which PEFT loads" in said


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "must have peft_type LORA, got 'IA3'"),
        ({"use_rslora": True}, "must not set use_rslora, got True"),
        ({"use_dora": True}, "must not set use_dora"),
        ({"rank_pattern": {Q: 2}}, "must not set rank_pattern"),
        ({"alpha_pattern": {Q: 2}}, "must not set alpha_pattern"),
        ({"r": "four"}, "must be an int"),
        ({"lora_alpha": None}, "must be a float"),
    ],
)
def test_other_configs(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = write(tmp_path, tensors_of(bert(), [Q]), **config)
    assert said in refusal(lambda: qk.from_lora_xs(bert(), folder))


def test_wrong_paths_and_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no LoRA-XS checkpoint at"):
        qk.from_lora_xs(bert(), tmp_path)
    folder = write(tmp_path / "a", tensors_of(bert(), [Q]))
    said = refusal(lambda: qk.from_lora_xs(llama(), folder))
    assert f"model must have a linear layer {Q}" in said
    assert "model must be an nn.Module" in refusal(lambda: qk.from_lora_xs("bert", folder))
    for damage in ("{", "[]", '{"r": 4}'):
        (folder / "adapter_config.json").write_text(damage)
        assert "is no config of LoRA-XS" in refusal(lambda: qk.from_lora_xs(bert(), folder))
    write(folder, tensors_of(bert(), [Q]))
    (folder / "adapter_model.safetensors").write_bytes(b"\x08")
    said = refusal(lambda: qk.from_lora_xs(bert(), folder))
    assert "not a complete safetensors file" in said
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        qk.from_lora_xs(bert(), folder)
    (folder / "adapter_model.bin").write_bytes(b"junk")
    assert "holds no tensors that load" in refusal(lambda: qk.from_lora_xs(bert(), folder))


@pytest.mark.parametrize("damage", [b"{", b"[]", b"\xff"])
def test_a_damaged_config_one_folder_up(damage: bytes, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", tensors_of(bert(), [Q]))
    (tmp_path / "reconstr_config.json").write_bytes(damage)
    said = refusal(lambda: qk.from_lora_xs(bert(), folder))
    assert said.startswith(f"{tmp_path / 'reconstr_config.json'} is no config of LoRA-XS")


@pytest.mark.parametrize(("held", "where"), [([1, 2], "list in the file"), ({"x": 1}, "int in x")])
def test_a_bin_file_of_something_else(held: Any, where: str, tmp_path: Path) -> None:
    folder = write(tmp_path, tensors_of(bert(), [Q]))
    (folder / "adapter_model.safetensors").unlink()
    torch.save(held, folder / "adapter_model.bin")
    said = refusal(lambda: qk.from_lora_xs(bert(), folder))
    assert f"must hold tensors by name, got {where}" in said


def test_a_head_that_is_missing(tmp_path: Path) -> None:
    """The model's own, drawn at random, was left there without a word."""
    folder = write(tmp_path, tensors_of(bert(), [Q]), modules_to_save=["classifier", "score"])
    model = bert()
    said = refusal(lambda: qk.from_lora_xs(model, folder))
    assert "must hold classifier, which trained by its modules_to_save" in said
    assert not qk.adapted_layers(model)


def test_a_weight_of_zeros(tmp_path: Path) -> None:
    model = bert()
    with torch.no_grad():
        model.get_submodule(Q).weight.zero_()
    qk.from_lora_xs(model, write(tmp_path, tensors_of(model, [Q])))
    assert list(qk.adapted_layers(model)) == [Q]


def test_a_model_with_other_adapters(tmp_path: Path) -> None:
    folder = write(tmp_path, tensors_of(bert(), [Q]))
    model = bert()
    qk.adapt(model, ["value"], rank=2, progress=False)
    said = refusal(lambda: qk.from_lora_xs(model, folder))
    assert "adapted layers that" in said
