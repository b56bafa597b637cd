"""The core by itself: a copy that shares nothing with the package's."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from problems import Core
from torch import Tensor

STATES = (
    "_is_any_autocast_enabled",
    "_are_functorch_transforms_active",
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_get_tracing_state",
)


def _built() -> Path | None:
    package = importlib.util.find_spec("qrlora_kernels")
    assert package is not None
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    folders = [Path(folder) for folder in package.submodule_search_locations or ()]
    return next((path for folder in folders for path in folder.glob(f"_C{suffix}")), None)


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Loaded from another file: what it is told must not reach the package."""
    built = _built()
    if built is None:
        pytest.skip("the native core is not built")
    copy = shutil.copy(built, tmp_path_factory.mktemp("core"))
    spec = importlib.util.spec_from_file_location("told._C", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def core(loaded: ModuleType) -> Iterator[Core]:
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    states = tuple(getattr(torch._C, name, None) for name in STATES)
    if capsule is None or None in states:
        pytest.skip("this torch does not offer what calls on tensors need")
    last: dict[Any, Any] = {}
    arguments = (Tensor, torch.nn.Parameter, states, torch.is_grad_enabled, torch.get_num_threads)
    assert loaded.set_torch(capsule, *arguments, last)
    threads = torch.get_num_threads()
    yield Core(loaded, last)
    torch.set_num_threads(threads)
    loaded.forget_choices()


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16"])
def column(request: pytest.FixtureRequest, loaded: ModuleType) -> str:
    """Each instruction set that runs here."""
    name: str = request.param
    reason = loaded.instruction_sets().get(name, "it is not in this build")
    if reason:
        pytest.skip(f"{name}: {reason}")
    return name
