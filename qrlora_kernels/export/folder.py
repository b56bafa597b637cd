"""A folder to write into: what may lie in it already."""

from __future__ import annotations

from pathlib import Path

# What tells that a folder holds something whose files a loader would mix with the new ones.
MODEL = ("config.json",)  # from_pretrained puts an adapter beside it on top
PEFT = ("adapter_model.safetensors", "adapter_model.bin")
MLX = ("adapters.safetensors", "adapters.npz")
ADAPTER = ("adapter_config.json",)


def refuse_mixed(folder: Path, *others: str) -> None:
    """Raise if one of the files ``others`` lies in ``folder``.

    Raises
    ------
    ValueError
        It names the file.
    """
    for name in others:
        if (folder / name).exists():
            raise ValueError(
                f"path must be a folder of its own, got {folder} with {name}: loaders would mix "
                "the two"
            )
