"""MLX's own files, read by MLX's rule, and by MLX itself where it is installed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import readers
import torch
from exported import (
    IDS,
    RANKS,
    adapt,
    adapted,
    distance,
    files_in,
    gpt2,
    llama,
    logits,
    meant,
    move,
    refusal,
)
from safetensors.torch import load_file
from saved import base
from transformers import LlamaForCausalLM

import qrlora_kernels as qk

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("adapter", ["qr", "lora_xs"])
def test_every_layer_by_its_rule(adapter: str, tmp_path: Path) -> None:
    model = adapted("llama", adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert qk.to_mlx(model, tmp_path) == {}
    assert files_in(tmp_path) == ["adapter_config.json", "adapters.safetensors"]
    readers.assert_same(readers.by_mlx(tmp_path), meant(model))
    assert readers.config(tmp_path)["lora_parameters"]["rank"] == max(RANKS["llama"].values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted("llama")
    qk.to_mlx(model, tmp_path, dtype=dtype)
    held = load_file(tmp_path / "adapters.safetensors")
    assert {t.dtype for t in held.values()} == {dtype}
    readers.assert_same(readers.by_mlx(tmp_path), meant(model), rtol=0.02)


def test_ohora_truncated(tmp_path: Path) -> None:
    model = llama()
    qk.adapt(model, ["q_proj"], "ohora", columns="selected", progress=False)
    move(model)
    assert "truncate=R" in refusal(lambda: qk.to_mlx(model, tmp_path))
    assert files_in(tmp_path) == []
    with pytest.warns(UserWarning, match="truncated 2 updates") as told:
        errors = qk.to_mlx(model, tmp_path, truncate=6)
    assert told[0].filename == __file__
    found = readers.by_mlx(tmp_path)
    for name, want in meant(model).items():
        error = float((found[name] - want).norm() / want.norm())
        assert errors[name] == pytest.approx(error, rel=1e-3)


def test_what_mlx_has_no_place_for(tmp_path: Path) -> None:
    said = refusal(lambda: qk.to_mlx(adapted("bert"), tmp_path))
    assert "classifier trained in full, and MLX has no place" in said
    model = adapt(gpt2(), {"transformer.h.0.attn.c_proj": 2})
    assert "is a Conv1D" in refusal(lambda: qk.to_mlx(model, tmp_path))
    model = adapt(llama(tied=True), {Q: 2, "lm_head": 2})
    assert "lm_head has a weight that is another module's" in refusal(
        lambda: qk.to_mlx(model, tmp_path)
    )
    assert "model must hold adapted" in refusal(lambda: qk.to_mlx(llama(), tmp_path))
    assert "dtype must be" in refusal(lambda: qk.to_mlx(llama(), tmp_path, dtype=torch.int8))
    assert files_in(tmp_path) == []


def test_names_that_mlx_may_not_know(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="MLX may call 0 otherwise") as told:
        qk.to_mlx(adapt(base(), {"0": 2}), tmp_path)
    assert told[0].filename == __file__


@pytest.mark.parametrize("tied", [False, True])
def test_mlx_itself(tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.utils import load_adapters, load_model

    def answer(model: Any) -> torch.Tensor:
        return torch.tensor(model(mx.array(IDS.tolist())).tolist())

    ranks = RANKS["llama"] | ({} if tied else {"lm_head": 3})
    model = adapt(llama(tied), ranks)
    plain: LlamaForCausalLM = llama(tied)
    plain.save_pretrained(tmp_path / "base")
    qk.to_mlx(model, tmp_path / "lora")
    served = load_adapters(load_model(tmp_path / "base")[0], str(tmp_path / "lora"))
    assert distance(answer(served), logits(model), logits(plain)) < 1e-4
