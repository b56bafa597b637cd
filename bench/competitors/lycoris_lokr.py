"""LyCORIS's LoKr: rebuilt weight (its default), per-token product, and its kernels."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from torch import nn

from ..problem import LayerProblem, Runner, Unavailable
from .registry import LAYERS, Layer


def _lokr(bypass: bool, kernels: bool, problem: LayerProblem) -> Runner:
    if tuple(int(part) for part in version("lycoris-lora").split(".")[:2]) < (4, 1):
        raise Unavailable(f"lycoris-lora 4.1 or later is needed, got {version('lycoris-lora')}")
    if kernels and problem.device.type != "cuda":
        raise Unavailable("the kernels of LyCORIS take CUDA tensors only")
    from lycoris import create_lycoris

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    model = nn.Sequential(OrderedDict(linear=problem.linear()))
    network = create_lycoris(
        model,
        algo="lokr",
        factor=problem.case.kron_rank(),
        full_matrix=True,
        unbalanced_factorization=True,
        bypass_mode=bypass,
    )
    network.apply_to()
    network.to(problem.device)
    (module,) = network.loras
    a, b = (problem.operands("lokr")[name].detach() for name in ("a", "b"))
    if module.lokr_w1.shape != a.shape or module.lokr_w2.shape != b.mT.shape:
        raise Unavailable(f"its factors are {module.lokr_w1.shape} and {module.lokr_w2.shape}")
    module.lokr_w1.data.copy_(a)
    module.lokr_w2.data.copy_(b.mT)
    return Runner(
        model.linear,  # its forward is the adapter's now
        {"a": module.lokr_w1, "b": module.lokr_w2},
        transposed=("b",),
        context=functools.partial(_backend, "auto" if kernels else "torch"),
        save=lambda folder: network.save_weights(Path(folder) / "lokr.safetensors", None, {}),
        rank=a.shape[1],
    )


@contextlib.contextmanager
def _backend(name: str) -> Iterator[None]:
    before = os.environ.get("LYCORIS_KERNEL_BACKEND")
    os.environ["LYCORIS_KERNEL_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["LYCORIS_KERNEL_BACKEND"]
        else:
            os.environ["LYCORIS_KERNEL_BACKEND"] = before


for _name, _bypass, _kernels in (
    ("lycoris", False, False),
    ("lycoris/bypass", True, False),
    ("lycoris/kernels", True, True),
):
    LAYERS.append(
        Layer(_name, "lokr", functools.partial(_lokr, _bypass, _kernels), needs=("lycoris",))
    )
