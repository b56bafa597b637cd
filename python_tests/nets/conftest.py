"""Fixtures of the nets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qrlora_kernels.backends import triton
from qrlora_kernels.dispatch import chooser


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """No net depends on the number, and small problems on two threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_choices() -> Iterator[None]:
    """What is chosen in the test is not known outside it."""
    chooser._choose.cache_clear()
    yield
    chooser._choose.cache_clear()


@pytest.fixture
def interpreted(fresh_choices: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton takes tensors of the CPU where there is no GPU: the tests' conftest.py imported it
    for its interpreter."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton.available.cache_clear()
    yield
    triton.available.cache_clear()
