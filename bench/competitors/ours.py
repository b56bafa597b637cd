"""This package's layers, as a user builds them, on the backend that the chooser takes."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import nn

import qrlora_kernels as qk
from qrlora_kernels.adapters import LoRAXSOptions, OHoRAOptions, Options, QROptions
from qrlora_kernels.nn import AdapterLinear

from ..problem import TRAINABLES, LayerProblem, Runner, Unavailable
from .registry import LAYERS, R_KRON, Layer

NAME = "qrlora_kernels"
FROZEN_PREPACKED = "frozen prepacked"
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


def _layer(adapter: str, problem: LayerProblem) -> Runner:
    kind, options = _TYPES[adapter]
    state = problem.operands(adapter)
    rank = state["a" if adapter == "ohora" else TRAINABLES[adapter][0]].shape[-1]
    if adapter == "qr":  # kept by the layer for its file; no part in the computation
        state["pivots"] = torch.arange(rank)
        state["diagonal"] = torch.ones(rank, dtype=torch.float64)
    layer = kind.from_state(problem.linear(), options(rank), state)
    return Runner(
        layer,
        {name: getattr(layer, name) for name in TRAINABLES[adapter]},
        save=functools.partial(_save_started, kind, options(rank), problem),
        operation=_OPERATIONS[adapter],
        rank=rank,
    )


def _frozen_prepacked(problem: LayerProblem) -> Runner:
    return Runner(qk.prepack(problem.linear(), packed="both"))


def _prepacked(adapter: str, problem: LayerProblem) -> Runner:
    runner = _layer(adapter, problem)
    assert isinstance(runner.module, nn.Module)
    qk.prepack(runner.module, packed="both")
    return runner


def _r_kron(problem: LayerProblem) -> Runner:
    state = problem.operands("ohora")
    options = OHoRAOptions(rank=state["a"].shape[-1], product="materialised")
    layer = qk.OHoRALinear.from_state(problem.linear(), options, state)
    trainables = {name: getattr(layer, name) for name in TRAINABLES["ohora"]}
    save = functools.partial(_save_started, qk.OHoRALinear, options, problem)
    return Runner(layer, trainables, save=save)


def _save_started(
    kind: type[AdapterLinear], options: Options, problem: LayerProblem, folder: object
) -> None:
    """Of a real start: what is timed has drawn factors, which follow from no weight."""
    model = nn.Sequential(OrderedDict(linear=problem.linear()))
    qk.adapt(model, ["linear"], kind.kind, progress=False, **options.to_dict())
    qk.save_adapter(model, f"{folder}/adapter.safetensors")


def _operation(adapter: str, problem: LayerProblem, backend: str | None = None) -> Runner:
    """What an author of another adapter imports: the operation alone."""
    operands, linear = problem.operands(adapter), problem.linear()
    call = functools.partial(
        getattr(qk.functional, _OPERATIONS[adapter]), backend=backend, **operands
    )
    return Runner(
        lambda x: call(x, linear.weight, linear.bias),
        {name: operands[name] for name in TRAINABLES[adapter]},
        operation=_OPERATIONS[adapter],
        rank=operands[TRAINABLES[adapter][0]].shape[-1],
    )


def _pinned(adapter: str, backend: str, problem: LayerProblem) -> Runner:
    """The operation alone on one backend, whatever the chooser would take."""
    ok, reason = qk.backends.report().get(backend, (False, "there is none of this name"))
    if not ok:
        raise Unavailable(f"backend {backend}: {reason}")
    runner = _operation(adapter, problem, backend)
    try:
        runner.forward(problem.x)
    except ValueError as error:
        raise Unavailable(str(error)) from None
    return runner


def operations() -> list[Layer]:
    """The functions of ``qrlora_kernels.functional``, without the module around them."""
    return [Layer(NAME, adapter, functools.partial(_operation, adapter)) for adapter in _TYPES]


def prepacked() -> list[Layer]:
    """The frozen layer and the adapted ones that keep frozen matrices as a kernel reads them."""
    adapted = [
        Layer(f"{NAME} prepacked", adapter, functools.partial(_prepacked, adapter))
        for adapter in _TYPES
    ]
    return [Layer(FROZEN_PREPACKED, "", _frozen_prepacked), *adapted]


def composed() -> list[Layer]:
    """Each family of nn modules as library products alone, the rival that the chooser must beat."""
    return [
        Layer("composed", adapter, functools.partial(_pinned, adapter, "composed"))
        for adapter in _TYPES
    ]


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
LAYERS.append(Layer(NAME, "lokr", functools.partial(_operation, "lokr")))
LAYERS.append(Layer(R_KRON, "ohora", _r_kron, not_in=("grid", "decode", "overhead")))
