"""This package's layers, as a user builds them, on the backend that the chooser takes."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels.nn.base import AdapterLinear, Options
from qrlora_kernels.nn.lora_xs import LoRAXSOptions
from qrlora_kernels.nn.ohora import OHoRAOptions
from qrlora_kernels.nn.qr import QROptions

from ..problem import TRAINABLES, LayerProblem, Runner, Unavailable
from .registry import LAYERS, Layer

NAME = "qrlora_kernels"
_TYPES: dict[str, tuple[type[AdapterLinear], Callable[[int], Options]]] = {
    "qr": (qk.QRLinear, lambda r: QROptions(rank=r)),
    "lora_xs": (qk.LoRAXSLinear, lambda r: LoRAXSOptions(rank=r)),
    "ohora": (qk.OHoRALinear, lambda r: OHoRAOptions(rank=r)),
}
_OPERATIONS = {
    "qr": "qr_linear",
    "lora_xs": "lora_xs_linear",
    "ohora": "kron_linear",
    "lokr": "kron_linear",
}


def _layer(adapter: str, problem: LayerProblem, backend: str | None = None) -> Runner:
    kind, options = _TYPES[adapter]
    state = problem.operands(adapter)
    rank = state["a" if adapter == "ohora" else TRAINABLES[adapter][0]].shape[-1]
    if adapter == "qr":  # kept by the layer for its file; no part in the computation
        state["pivots"] = torch.arange(rank)
        state["diagonal"] = torch.ones(rank, dtype=torch.float64)
    layer = kind.from_state(problem.linear(), options(rank), state)
    model = nn.Sequential(OrderedDict(linear=layer))
    return _runner(
        adapter,
        layer,
        {name: getattr(layer, name) for name in TRAINABLES[adapter]},
        backend,
        functools.partial(_save, model),
        rank,
    )


def _save(model: nn.Module, folder: object) -> None:
    qk.save_adapter(model, f"{folder}/adapter.safetensors")


def _lokr(problem: LayerProblem, backend: str | None = None) -> Runner:
    """What an author of a Kronecker adapter imports: the operation alone."""
    operands, linear = problem.operands("lokr"), problem.linear()
    a, b = operands["a"], operands["b"]

    def forward(x: Tensor) -> Tensor:
        return qk.functional.kron_linear(x, linear.weight, linear.bias, a, b)

    return _runner("lokr", forward, {"a": a, "b": b}, backend, None, a.shape[1])


def _runner(
    adapter: str,
    module: Callable[[Tensor], Tensor],
    trainables: dict[str, Tensor],
    backend: str | None,
    save: Callable[[object], object] | None,
    rank: int,
) -> Runner:
    runner = Runner(module, trainables, save=save, operation=_OPERATIONS[adapter], rank=rank)
    if backend is not None:
        runner.context = functools.partial(qk.backends.use_backend, backend)
    return runner


def _pinned(adapter: str, backend: str, problem: LayerProblem) -> Runner:
    ok, reason = qk.backends.report().get(backend, (False, "there is none of this name"))
    if not ok:
        raise Unavailable(f"backend {backend}: {reason}")
    build = _lokr if adapter == "lokr" else functools.partial(_layer, adapter)
    runner = build(problem, backend=backend)
    try:
        runner.forward(problem.x)
    except ValueError as error:
        raise Unavailable(str(error)) from None
    return runner


@contextlib.contextmanager
def each_backend(backends: list[str]) -> Iterator[None]:
    """For the time of the block, also register each family on each of these backends."""
    added = [
        Layer(f"{NAME}[{backend}]", adapter, functools.partial(_pinned, adapter, backend))
        for backend in backends
        for adapter in _OPERATIONS
    ]
    LAYERS.extend(added)
    try:
        yield
    finally:
        for layer in added:
            LAYERS.remove(layer)


LAYERS += [Layer(NAME, name, functools.partial(_layer, name)) for name in _TYPES]
LAYERS.append(Layer(NAME, "lokr", _lokr))
