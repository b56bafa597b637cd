"""The package from outside: what an import costs and pulls in, the report, the public names."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

import qrlora_kernels as qk
from qrlora_kernels import backends

OPTIONAL = ("triton", "transformers", "peft", "scipy", "matplotlib", "sklearn", "pandas")


def _python(*arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def after_import() -> dict:
    """What a fresh process sees after torch, and then after the package."""
    code = (
        "import sys, time, json, torch\n"
        "before, threads = set(sys.modules), torch.get_num_threads()\n"
        "start = time.process_time()\n"
        "import qrlora_kernels as qk\n"
        "seconds = time.process_time() - start\n"
        "own = sorted({m.split('.')[0] for m in set(sys.modules) - before})\n"
        "loaded = [m for m in sys.modules if m.startswith('qrlora_kernels.backends.')]\n"
        "print(json.dumps({'seconds': seconds, 'new': own, 'cuda': torch.cuda.is_initialized(),\n"
        "                  'threads': torch.get_num_threads(), 'threads_before': threads,\n"
        "                  'backends': loaded}))\n"
    )
    return json.loads(_python("-c", code))


def test_import_pulls_in_nothing_optional(after_import):
    assert not set(OPTIONAL) & set(after_import["new"])


def test_import_starts_nothing(after_import):
    assert not after_import["cuda"]
    loaded = {name.rpartition(".")[2] for name in after_import["backends"]}
    assert not loaded, "backends are imported on first use"
    assert after_import["threads"] == after_import["threads_before"]


def test_import_is_quick(after_import):
    """Processor seconds beyond torch's own; about a tenth of this when it was written."""
    assert after_import["seconds"] < 1.0


def test_every_public_name_is_there():
    for module in (qk, qk.functional, qk.linalg, qk.nn, qk.backends):
        missing = [name for name in module.__all__ if not hasattr(module, name)]
        assert not missing
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", qk.__version__)


def test_report_names_versions_and_every_backend(capsys):
    runpy.run_module("qrlora_kernels", run_name="__main__")
    text = capsys.readouterr().out
    assert text.startswith(f"qrlora_kernels {qk.__version__}\n")
    assert f"torch {torch.__version__}" in text
    lines = text.splitlines()
    for name in backends.BACKENDS:
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        answer, reason = line.split()[1], line.split()[2:]
        assert answer in ("yes", "no")
        assert reason, "each backend says why it is or is not available"
    for name in ("triton", "transformers", "peft", "scipy", "matplotlib"):
        found = find_spec(name) is not None
        assert (f"{name} not installed" in text) == (not found)
    assert "native core:" in text


def test_a_package_without_a_native_core_works_and_says_so(tmp_path):
    """No compiler, or a failed build: the reference runs, and the report has the reason."""
    code = (
        "import sys\n"
        "sys.modules['qrlora_kernels._C'] = None\n"
        "import torch, qrlora_kernels as qk\n"
        "from qrlora_kernels.__main__ import report\n"
        "assert qk.build_config() == {}\n"
        "layer = qk.OHoRALinear.from_linear(torch.nn.Linear(16, 16))\n"
        "layer(torch.randn(3, 16)).sum().backward()\n"
        "qk.QRLinear.from_linear(torch.nn.Linear(16, 16), 4)(torch.randn(3, 16))\n"
        "print(qk.backends.last_choice('kron_linear').name)\n"
        "print(report())\n"
    )
    text = _python("-c", code)
    assert text.splitlines()[0] not in ("cpu", "amx")
    (cpu,) = [line for line in text.splitlines() if line.split()[:1] == ["cpu"]]
    assert cpu.split()[1] == "no"
    (core,) = [line for line in text.splitlines() if line.startswith("native core: ")]
    assert "built with" not in core
    assert len(core) > len("native core: ")


def test_build_config_comes_from_the_binary():
    config = qk.build_config()
    if find_spec("qrlora_kernels._C") is None:
        assert config == {}
        return
    assert {"compiler", "version", "cuda", "cpu_kernels"} <= set(config)
    assert all(isinstance(v, str) and v for v in config.values())
