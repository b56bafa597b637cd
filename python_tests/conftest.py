"""Shared fixtures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

import emulated
import pytest
import torch

from qrlora_kernels import panels
from qrlora_kernels.dispatch import chooser, tuning

if not torch.cuda.is_available():
    # Triton decides while it is imported whether its functions compile or are interpreted, and
    # torch.compile may import it at any time. The variable is taken back, so that backends are
    # chosen as they are without it; the tests of the kernels set it for themselves.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        import qrlora_kernels.backends.triton.kron
        import qrlora_kernels.backends.triton.skinny
        import qrlora_kernels.backends.triton.two_phase  # noqa: F401
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def no_measurements_left() -> Iterator[None]:
    """What one test tunes, the code of a page say, does not choose for the next one."""
    yield
    if tuning.table:
        tuning.clear()
        chooser.forget()


@pytest.fixture
def native_products_ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of the library's, whatever they are on this processor."""
    monkeypatch.setattr(panels, "used", lambda dtype: True)
    monkeypatch.setattr(panels, "amd", lambda: True)
    chooser.forget()
    yield
    chooser.forget()


@pytest.fixture
def native_products_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library's, whatever they are on this processor."""
    monkeypatch.setattr(panels, "used", lambda dtype: False)
    chooser.forget()
    yield
    chooser.forget()


@pytest.fixture(scope="session")
def emulated_cuda(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ModuleType:
    """The CUDA kernels, their device code run on the CPU through an emulation, not on a GPU."""
    cache = getattr(request.config, "cache", None)
    folder = tmp_path_factory.mktemp("emulated") if cache is None else cache.mkdir("emulated")
    try:
        return emulated.build(folder)
    except FileNotFoundError as missing:
        pytest.skip(f"the emulation of CUDA cannot be built: {missing}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: of several processes, none is left with one of them alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Which backends run here is asked while tests are collected, and must not hang on a test."""
    assert "TRITON_INTERPRET" not in os.environ or torch.cuda.is_available(), (
        "a test module set TRITON_INTERPRET while it was imported"
    )
