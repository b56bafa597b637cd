"""A process that trains on batches of changing length over layers of different ranks stays small.

A library that makes code or keeps memory for every new shape of a product (oneDNN does, for bf16)
would grow it step by step: tokens times ranks times layouts. The native kernels take both when they
run.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from qrlora_kernels import native

MIB = 100  # over the same model frozen

# The process prints by how many MiB 200 steps of changing length made it grow, the model frozen and
# then adapted.
STEPS = """
import sys, torch, qrlora_kernels as qk
from pathlib import Path

dtype = getattr(torch, sys.argv[1])
torch.manual_seed(0)
layers = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(12))).requires_grad_(False)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

def step(tokens):
    x = torch.randn(tokens, 128, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        layers(x).sum().backward()

def growth():
    step(300)
    before = resident()
    for i in range(200):
        step(40 + 37 * i % 211)
    return resident() - before

qk.prepack(layers)
frozen = growth()
qk.prepack(layers, False)
for number in range(12):
    qk.adapt(layers, [str(number)], rank=43 + number, progress=False)
qk.prepack(layers)
print(f"grew by {frozen:.1f} and {growth():.1f}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.skipif(native.CORE is None, reason=native.REASON)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_200_steps_of_changing_length(dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEPS, dtype], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"grew by (-?[\d.]+) and (-?[\d.]+)", done.stdout)
    assert found, done.stdout
    frozen, adapted = map(float, found.groups())
    assert adapted - frozen < MIB
