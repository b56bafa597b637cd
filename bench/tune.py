"""Which backend is fastest at each step on this GPU: ``python -m bench.tune``, run by gpu_check.sh.

Prints every contest and writes the table that ``QRLORA_TUNING`` reads; what it finds is what
``qrlora_kernels/dispatch/rules.py`` should come to say of this chip.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from qrlora_kernels.backends import Problem
from qrlora_kernels.model.tune import tune_problems

TOKENS = (8192, 2048, 16, 512, 1)
# (operation, N, K, r), most asked for first
SHAPES = (
    ("qr_linear", 4096, 4096, 64),
    ("kron_linear", 4096, 4096, 64),
    ("lora_xs_linear", 4096, 4096, 64),
    ("qr_linear", 4096, 4096, 150),
    ("qr_linear", 14336, 4096, 64),
    ("kron_linear", 14336, 4096, 64),
)


def problems_of(
    op: str, n: int, k: int, r: int, device: torch.device, tokens: Sequence[int] = TOKENS
) -> list[Problem]:
    """Both steps of a shape at each number of tokens: they are chosen apart."""
    bf16 = torch.bfloat16
    return [Problem(op, device, bf16, m, n, k, r, step) for m in tokens for step in ("fwd", "bwd")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder of tuning.json")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each problem")
    options = parser.parse_args()
    device = torch.empty(0, device=options.device).device  # with its index
    for op, n, k, r in SHAPES:
        problems = problems_of(op, n, k, r, device)
        # One shape after the other: what was measured is written even if time runs out.
        found = tune_problems(problems, path=options.out / "tuning.json", seconds=options.seconds)
        print(found, flush=True)


if __name__ == "__main__":
    main()
