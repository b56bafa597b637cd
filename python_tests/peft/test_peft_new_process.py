"""What a file gives in a process that did not write it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft_models import CONFIGS, DTYPES, TARGETS, bert, gpt2, llama, saved

pytestmark = pytest.mark.slow
BASES = {"bert": bert, "llama": llama, "gpt2": gpt2}
FILES = [("bert", adapter, dtype) for adapter in CONFIGS for dtype in DTYPES]
FILES += [
    (base, adapter, torch.float32) for base in ("llama", "gpt2") for adapter in ("qr", "ohora")
]


def _name(base: str, adapter: str, dtype: torch.dtype) -> str:
    return f"{base}-{adapter}-{str(dtype).removeprefix('torch.')}"


def _load_all(folder: Path) -> None:
    """In the other process: each way once, and their predictions into a file."""
    from peft import PeftModel
    from peft_models import predictions

    found = {}
    for base, adapter, dtype in FILES:
        name = _name(base, adapter, dtype)
        model = PeftModel.from_pretrained(BASES[base](dtype=dtype), folder / name)
        other = BASES[base](dtype=dtype)
        other.load_adapter(str(folder / name))
        found[name] = predictions(model), predictions(other)
    torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[torch.Tensor]]:
    """Here and there, by PEFT and by transformers."""
    folder = tmp_path_factory.mktemp("files")
    here = {}
    for base, adapter, dtype in FILES:
        name = _name(base, adapter, dtype)
        model = BASES[base](dtype=dtype)
        here[name] = saved(folder / name, adapter, model, target_modules=TARGETS[base])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(folder)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    there = torch.load(folder / "found.pt")
    return {name: [tensor, *there[name]] for name, tensor in here.items()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: _name(*file))
def test_a_new_process_predicts_the_same_bits(
    file: tuple[str, str, torch.dtype], predicted: dict[str, list[torch.Tensor]]
) -> None:
    here, by_peft, by_transformers = predicted[_name(*file)]
    assert torch.equal(here, by_peft)
    assert torch.equal(here, by_transformers)


if __name__ == "__main__":
    _load_all(Path(sys.argv[1]))
