"""The harness of PEFT's suite, over a suite of four tests: rows, skips, failures, the archive."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

from python_tests.peft_suite.folder import unpack_tests

ROOT = Path(__file__).parents[1]
FILES = {
    "testing_utils.py": """
from datasets import load_dataset

def hub_online_once(model_id):
    raise AssertionError("asked the hub")
""",
    "testing_common.py": """
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from .testing_utils import hub_online_once

def check_mixed(config_cls):
    assert config_cls is LoraConfig
    with hub_online_once("a model"):
        pass
""",
    "test_custom_models.py": """
import pytest, torch
from peft import LoraConfig, VeraConfig

COLUMNS = "test_name, model_id, config_cls, config_kwargs"
CASES = [("LoRA", "MLP", LoraConfig, {}), ("VeRA", "MLP", VeraConfig, {"r": 256})]

class DeepMLP(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 3)

@pytest.mark.parametrize(COLUMNS, CASES)
def test_some_model(test_name, model_id, config_cls, config_kwargs):
    assert model_id != "EmbConv1D"
    assert "r" not in config_kwargs

@pytest.mark.parametrize(COLUMNS, CASES)
def test_that_skips(test_name, model_id, config_cls, config_kwargs):
    pytest.skip(f"Not applicable for {config_cls}")

@pytest.mark.parametrize("config_cls", [LoraConfig, VeraConfig])
def test_loading_model_requires_grad_set_correctly(config_cls):
    assert torch.equal(DeepMLP().weight, DeepMLP().weight)

@pytest.mark.parametrize("config_cls", [LoraConfig])
def test_of_lora_alone(config_cls):
    raise AssertionError

def test_of_no_config():
    raise AssertionError
""",
    "test_decoder_models.py": """
import pytest
from peft import LoraConfig, VeraConfig
from .testing_common import check_mixed

@pytest.mark.parametrize("model_id", ["a/tiny-OPT", "a/tiny-LlamaForCausalLM"])
@pytest.mark.parametrize("config_cls,config_kwargs", [(LoraConfig, {}), (VeraConfig, {})])
def test_mixed_adapter_batches(model_id, config_cls, config_kwargs):
    assert config_cls is LoraConfig and "Llama" in model_id
    check_mixed(config_cls)
""",
}


def _write(cache: Path, files: dict[str, str]) -> None:
    """A source distribution of the installed PEFT, in the cache folder."""
    name = f"peft-{version('peft')}"
    path = cache / "qrlora_kernels" / f"{name}.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for file, text in files.items():
            info = tarfile.TarInfo(f"{name}/tests/{file}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))


def _run(cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "python_tests.peft_suite", "--short"]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_rows_are_ours_and_a_failure_is_the_exit_status(tmp_path):
    _write(tmp_path, FILES)
    done = _run(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    counts = dict(re.findall(r"^(QRLora|LoraXS|OHora) +(\d+ +\d+ +\d+)", done.stdout, re.M))
    # Four rows of custom models, of which two fail; a class; and a batch that mixes adapters.
    assert {name: tuple(map(int, text.split())) for name, text in counts.items()} == {
        "QRLora": (4, 4, 2),
        "LoraXS": (4, 4, 2),
        "OHora": (4, 4, 2),
    }
    assert re.search(r"^ +4 +4 +4  Not applicable for this config$", done.stdout, re.M)


def test_without_the_network_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"peft-.*tar\.gz.*No matching distribution") as error:
        unpack_tests(tmp_path)
    assert "\n" not in str(error.value)


def test_an_archive_without_tests_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _write(tmp_path, {"other.py": ""})
    with pytest.raises(ValueError, match=r"must hold tests/testing_common\.py"):
        unpack_tests(tmp_path / "suite")
