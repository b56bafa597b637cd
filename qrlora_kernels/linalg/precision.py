"""Products as exact as their dtype, whatever autocast or fp32 precision the caller has set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def start_computation(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` without gradients and without autocast, which would round fp32 products.

    What it makes without naming a device is on the CPU, whatever the caller's default device is.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with (
            torch.no_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            return function(*args, **kwargs)

    return run


def work_dtype(weight: Tensor) -> torch.dtype:
    """fp32 for half and fp32 weights, fp64 for fp64 and where fp32 products may be TF32 or bf16.

    A single TF32 or bf16 pass loses the order of the pivots.
    """
    mkldnn: Any = torch.backends.mkldnn  # its stub does not know `matmul`
    settings = (torch.backends, torch.backends.cuda.matmul, mkldnn.matmul)
    exact = all(setting.fp32_precision in ("none", "ieee") for setting in settings)
    return torch.float32 if exact and weight.dtype != torch.float64 else torch.float64
