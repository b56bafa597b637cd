"""Shared fixtures."""

from __future__ import annotations

import contextlib
import os

import torch

if not torch.cuda.is_available():
    # Triton decides while it is imported whether its functions compile or are interpreted, and
    # torch.compile may import it at any time. The variable is taken back, so that backends are
    # chosen as they are without it; the tests of the kernels set it for themselves.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        import qrlora_kernels.backends.triton.kron
        import qrlora_kernels.backends.triton.linear  # noqa: F401
    del os.environ["TRITON_INTERPRET"]
