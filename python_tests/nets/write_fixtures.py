"""Writes ``fixtures/``: what this release saves, for every later release to load.

    python python_tests/nets/write_fixtures.py FOLDER

Never run it over the committed files: they are worth something because an earlier release wrote
them (each safetensors file says which). For another release's files, name another folder.

The model is three small linear layers, two adapted and a head that trains. Its weights are in the
files, since a seed gives other bits on another processor; the columns of the adapted ones shrink,
so that every pivot is far from a tie and factors that are rebuilt elsewhere are the same but for
roundings.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels.dispatch import tuning
from qrlora_kernels.dispatch.problem import Problem

ADAPTED, HEAD = ("0", "2"), "4"
ADAPTERS: dict[str, dict[str, Any]] = {
    "qr": {"rank": 4, "scaling": 0.5},
    "lora_xs": {"rank": 4, "alpha": 8.0, "init_std": 0.1},
    "ohora": {"rank": 4, "alpha": 8.0},
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FACTORS = ("stored", "auto")

# The tests put the name of their own chip in place of this one.
CHIP = "Example CPU, 1 threads"
MEASURED = tuple(
    tuning.entry_for(
        Problem(op, torch.device("cpu"), torch.float32, 16, 48, 80, r, step),
        *(winner, "composed:addmm", 0.5, "plain"),
    )._replace(chip=CHIP)
    for op, r, winner in (
        ("qr_linear", 4, "reference"),
        ("lora_xs_linear", 4, "reference"),
        ("kron_linear", 4, "reference"),
        ("linear_add", 48, "reference"),
        ("qr_linear", 8, "a backend that no release has"),
    )
    for step in ("fwd", "bwd")
    if (op, step) != ("linear_add", "bwd")
)


def net(dtype: torch.dtype) -> nn.Sequential:
    """The model, with weights of no meaning."""
    return nn.Sequential(
        nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    ).to(dtype)


def names() -> list[str]:
    """Every file of the folder."""
    cases = list(product(ADAPTERS, DTYPES))
    return sorted(
        [f"{adapter}-{dtype}-{f}.safetensors" for adapter, dtype in cases for f in FACTORS]
        + [f"{adapter}-{dtype}-state.safetensors" for adapter, dtype in cases]
        + [f"{dtype}-{what}.safetensors" for dtype in DTYPES for what in ("base", "outputs")]
        + ["tuning.json"]
    )


def _weights(model: nn.Sequential) -> None:
    """Random, the columns of the adapted layers in halving sizes and any order."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if name.endswith("weight") and not name.startswith(HEAD):
                columns = draw.shape[1]
                sizes = 0.5 ** torch.arange(columns).clamp(max=6)
                draw *= sizes[torch.randperm(columns, generator=generator)]
            parameter.copy_(draw)


def _train(model: nn.Sequential, x: Tensor) -> None:
    """Twenty steps of one size in the direction of each number's gradient."""
    target = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(20):
        gradients = torch.autograd.grad(nn.functional.mse_loss(model(x), target), trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= 0.05 * gradient.sign()


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    by = {"qrlora_kernels": qk.__version__, "torch": str(torch.__version__)}

    def save(name: str, tensors: dict[str, Tensor]) -> None:
        whole = {key: t.detach().contiguous().clone() for key, t in tensors.items()}
        save_file(whole, str(folder / f"{name}.safetensors"), by)

    for dtype_name, dtype in DTYPES.items():
        base = net(dtype)
        _weights(base)
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
        save(f"{dtype_name}-base", {**base.state_dict(), "x": x})
        outputs = {}
        for adapter, options in ADAPTERS.items():
            model = net(dtype)
            model.load_state_dict(base.state_dict())
            torch.manual_seed(0)  # the start of LoRA-XS draws from it
            qk.adapt(model, ADAPTED, adapter, trainable=[HEAD], progress=False, **options)
            _train(model, x)
            for factors in FACTORS:
                path = folder / f"{adapter}-{dtype_name}-{factors}.safetensors"
                qk.save_adapter(model, path, factors=factors)
            save(f"{adapter}-{dtype_name}-state", model.state_dict())
            with torch.no_grad():
                outputs[adapter] = model(x).float()
        save(f"{dtype_name}-outputs", outputs)
    tuning.clear()
    tuning.add(MEASURED)
    tuning.write(folder / "tuning.json")
    tuning.clear()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder")
    target = parser.parse_args().folder
    if target.exists():
        parser.error(f"folder must be a new one, got {target}")
    write(target)
