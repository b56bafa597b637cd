"""What a row says about where it was measured: machine, chips, versions, threads, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

import torch

from qrlora_kernels.dispatch.chip import chip_name

REPOSITORY = Path(__file__).resolve().parent.parent
PEERS = ("triton", "numpy", "scipy", "peft", "transformers", "lycoris-lora")


@cache
def facts() -> dict[str, str]:
    """Columns of a row that are the same for a whole run."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "cpu": chip_name(torch.device("cpu")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "threads": str(torch.get_num_threads()),
        "versions": "; ".join(
            [f"python {platform.python_version()}", f"torch {torch.__version__}", *_peers()]
        ),
        "commit": _commit(),
    }


def slug(chip: str) -> str:
    """A chip's name, fit for a file name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", " ", chip.lower())).strip("-")


_INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX",
}


def spoken(chip: str) -> str:
    """A row's chip as one would say it: without trade marks, flags by their names."""
    words = re.sub(r"\((R|TM)\)", "", chip).replace(", 1 threads", ", 1 thread")
    name, comma, threads = words.partition(",")
    flags = ", ".join(_INSTRUCTIONS[flag] for flag in name.split() if flag in _INSTRUCTIONS)
    name = " ".join(word for word in name.split() if word not in _INSTRUCTIONS)
    return name + (f" with {flags}" if flags else "") + comma + threads


def _peers() -> list[str]:
    installed = {dist.metadata["Name"]: dist.version for dist in distributions()}
    return [f"{name} {installed[name]}" if name in installed else f"no {name}" for name in PEERS]


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        # Rows and pages that an earlier run wrote are no change to what is measured.
        written = [":!bench/results", ":!docs", ":!README.md"]
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return git("rev-parse", "--short", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("QRLORA_COMMIT", "unknown")
