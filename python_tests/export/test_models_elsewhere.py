"""Models whose weights are away, spread over ranks, or in a wrapper."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import readers
import torch
import torch.distributed as dist
from exported import RANKS, adapt, adapted, files_in, llama, meant, refusal
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import qrlora_kernels as qk


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def offloaded(how: str, model: Any, folder: Path) -> Any:
    if how == "cpu":
        return accelerate.cpu_offload(model)
    return accelerate.disk_offload(model, str(folder / "weights"))


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_a_model_that_was_offloaded_after_it_was_adapted(how: str, tmp_path: Path) -> None:
    """What trains lies on the meta device then; it ended in an error of torch."""
    here = adapted("llama")
    away = offloaded(how, adapted("llama"), tmp_path)
    qk.to_lora(away, tmp_path / "lora")
    readers.assert_same(readers.by_peft(tmp_path / "lora"), meant(here))


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("trainable", [(), ("lm_head",)])
def test_a_model_that_is_offloaded(how: str, trainable: Any, tmp_path: Path) -> None:
    here = adapted("llama", trainable=trainable)
    away = adapt(offloaded(how, llama(), tmp_path), RANKS["llama"], trainable=trainable)
    assert any(p.is_meta for p in away.parameters())
    for name, model in (("here", here), ("away", away)):
        qk.to_lora(model, tmp_path / name / "lora")
        qk.to_merged(model, tmp_path / name / "merged")
    for file in ("lora/adapter_model.safetensors", "merged/model.safetensors"):
        ours, theirs = load_file(tmp_path / "away" / file), load_file(tmp_path / "here" / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert any(p.is_meta for p in away.parameters())  # and is as it was


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_a_tied_output_that_is_offloaded(how: str, tmp_path: Path) -> None:
    """Its weight is another tensor than the embedding's then, and was taken for one of its own."""
    ranks = {"lm_head": 3, "model.layers.0.self_attn.q_proj": 2}
    model = adapt(offloaded(how, llama(tied=True), tmp_path), ranks)
    said = refusal(lambda: qk.to_lora(model, tmp_path / "lora", for_="llama.cpp"))
    assert "llama.cpp has no tensor for lm_head" in said
    qk.to_merged(model, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "another module's too" in refusal(lambda: qk.to_mlx(model, tmp_path / "mlx"))


def test_a_sharded_bank(group: None, tmp_path: Path) -> None:
    model = adapted("llama")
    bank = qk.AdapterBank(model, 2)
    bank.add("mine")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    said = refusal(lambda: qk.to_lora(bank, tmp_path / "out", adapter="mine"))
    assert "model must not be sharded yet" in said
    assert files_in(tmp_path / "out") == []


def test_a_model_in_data_parallel(group: None, tmp_path: Path) -> None:
    model = adapted("llama")
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    qk.to_lora(wrapped, tmp_path / "lora")
    readers.assert_same(readers.by_peft(tmp_path / "lora"), meant(model))
    qk.to_merged(wrapped, tmp_path / "merged")
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(llama().state_dict())


def test_lora_files_need_neither_peft_nor_transformers(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules |= {{"peft": None, "transformers": None}}
import torch, qrlora_kernels as qk
model = qk.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), ["0"], rank=2, progress=False)
qk.to_lora(model, {str(tmp_path / "lora")!r}, for_="vllm")
qk.to_mlx(model, {str(tmp_path / "mlx")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(qk.__file__).parents[1])
    assert files_in(tmp_path / "lora") == ["adapter_config.json", "adapter_model.safetensors"]
    assert files_in(tmp_path / "mlx") == ["adapter_config.json", "adapters.safetensors"]
