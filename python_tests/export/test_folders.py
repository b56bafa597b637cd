"""What may lie in the folder that an export is written into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from exported import adapt, files_in, llama, refusal

import qrlora_kernels as qk

Q = "model.layers.0.self_attn.q_proj"
WRITERS: dict[str, Any] = {"lora": qk.to_lora, "mlx": qk.to_mlx, "merged": qk.to_merged}


@pytest.mark.parametrize("first", list(WRITERS))
@pytest.mark.parametrize("second", list(WRITERS))
def test_two_formats_in_one_folder(first: str, second: str, tmp_path: Path) -> None:
    """They share the name adapter_config.json, and a model with an adapter beside gets both."""
    model = adapt(llama(), {Q: 2})
    WRITERS[first](model, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    if first == second:
        WRITERS[second](model, tmp_path)
    else:
        said = refusal(lambda: WRITERS[second](model, tmp_path))
        assert "path must be a folder of its own" in said
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before


@pytest.mark.parametrize("write", list(WRITERS))
@pytest.mark.parametrize("config", [True, False])
def test_a_folder_in_a_files_place(write: str, config: bool, tmp_path: Path) -> None:
    """The weights were in place already when the config found no room, or the other way round."""
    model = adapt(llama(), {Q: 2})
    WRITERS[write](model, tmp_path / "plain")
    names = files_in(tmp_path / "plain")
    taken = next(n for n in names if n.endswith(".json" if config else ".safetensors"))
    (tmp_path / "out" / taken).mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=taken):
        WRITERS[write](model, tmp_path / "out")
    assert files_in(tmp_path / "out") == [taken]
