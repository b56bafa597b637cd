"""``python -m qrlora_kernels``: versions, backends and why each is or is not available."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, backends, native
from .dispatch import tuning
from .linalg import cuda_core

OPTIONAL = ("triton", "transformers", "peft", "scipy", "matplotlib")


def report() -> str:
    """The environment report as text."""
    lines = [
        f"qrlora_kernels {__version__}",
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "optional: " + ", ".join(f"{name} {_version(name)}" for name in OPTIONAL),
        f"GPU: {_gpus()}",
        "",
        f"native core: {native.REASON}",
        *(f"  {key}: {value}" for key, value in sorted(native.build_config().items())),
        *_instruction_sets(),
        "",
        "backends, in order of preference:",
    ]
    for name, (ok, reason) in backends.report().items():
        lines.append(f"  {name:10s} {'yes' if ok else 'no '}  {reason}")
    lines.append(f"measured on this machine: {_tuned()}")
    there, reason = cuda_core.available()
    lines += [
        "",
        f"pivoted QR of CUDA tensors: {reason if there else f'torch operations, {reason}'}",
    ]
    return "\n".join(lines)


def _instruction_sets() -> list[str]:
    """What this CPU has and lacks, each by name, and why the kernels for a set do not run here."""
    if native.CORE is None:
        return []
    features: list[tuple[str, bool]] = native.CORE.cpu_features()
    has = ", ".join(name for name, there in features if there)
    lacks = ", ".join(name for name, there in features if not there)
    sets: dict[str, str] = native.CORE.instruction_sets()
    names = native.build_config()["cpu_kernels"].split(",")
    return [
        f"  this CPU has: {has or 'the baseline alone'}",
        f"  this CPU lacks: {lacks or 'nothing that the kernels use'}",
        *(f"  kernels for {name}: {sets[name] or 'run here'}" for name in names),
    ]


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version"


def _tuned() -> str:
    try:
        tuning.read_named_file()
    except ValueError as error:
        return f"nothing: {error}"
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    chips = {tuning.here(device) for device in devices}
    count = sum(entry.chip in chips for entry in tuning.entries())
    return f"{count} problems" if count else "nothing (see qrlora_kernels.tune)"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return f"none that torch {torch.__version__} can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
