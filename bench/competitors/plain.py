"""The floor, and what one writes without this package: eager, torch.compile, addmm."""

from __future__ import annotations

import functools
import platform
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..problem import TRAINABLES, LayerProblem, Runner, Unavailable
from ..registry import ADAPTERS
from .registry import LAYERS, Layer

Expression = Callable[..., Tensor]


def _frozen(problem: LayerProblem) -> Runner:
    return Runner(problem.linear())


# --- three lines each, as one would write them


def qr_eager(x: Tensor, weight: Tensor, bias: Tensor, q: Tensor, r: Tensor, lam: Tensor) -> Tensor:
    h = F.linear(x, r)
    update = F.linear(h * lam.to(h.dtype), q)
    return F.linear(x, weight, bias) + update


def lora_xs_eager(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, core: Tensor
) -> Tensor:
    h = F.linear(x, a)
    update = F.linear(h @ core.to(h.dtype), b)
    return F.linear(x, weight, bias) + update


def lokr_eager(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, weight, bias) + _kron(x, a, b)


def ohora_eager(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor
) -> Tensor:
    return F.linear(x, weight, bias) + (_kron(x, a, b) - _kron(x, a0, b0))


def _kron(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    tokens = x.view(-1, a.shape[1], b.shape[0])
    return (a.to(x.dtype) @ (tokens @ b.to(x.dtype))).flatten(1)


# --- the same with the sum inside a library call


def qr_addmm(x: Tensor, weight: Tensor, bias: Tensor, q: Tensor, r: Tensor, lam: Tensor) -> Tensor:
    h = F.linear(x, r)
    return torch.addmm(F.linear(x, weight, bias), h * lam.to(h.dtype), q.mT)


def lora_xs_addmm(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, core: Tensor
) -> Tensor:
    h = F.linear(x, a)
    return torch.addmm(F.linear(x, weight, bias), h @ core.to(h.dtype), b.mT)


def lokr_addmm(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(_kron(x, a, b) + bias, x, weight.mT)


def ohora_addmm(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor
) -> Tensor:
    return torch.addmm(_kron(x, a, b) - _kron(x, a0, b0) + bias, x, weight.mT)


EAGER: dict[str, Expression] = {
    "": F.linear,
    "qr": qr_eager,
    "lora_xs": lora_xs_eager,
    "ohora": ohora_eager,
    "lokr": lokr_eager,
}
ADDMM: dict[str, Expression] = {
    "qr": qr_addmm,
    "lora_xs": lora_xs_addmm,
    "ohora": ohora_addmm,
    "lokr": lokr_addmm,
}


class Plain(nn.Module):
    """An expression as the forward of a layer, which is where its users keep it."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def expression(adapter: str, function: Expression, problem: LayerProblem) -> Runner:
    """A runner that calls ``function(x, weight, bias, **operands)``."""
    operands, linear = problem.operands(adapter), problem.linear()
    call = functools.partial(function, weight=linear.weight, bias=linear.bias, **operands)
    return Runner(Plain(call), {name: operands[name] for name in TRAINABLES[adapter]})


def _compiled(adapter: str, problem: LayerProblem) -> Runner:
    if problem.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise Unavailable(f"torch.compile needs a C++ compiler on {platform.machine()}")
    return expression(adapter, _compile(adapter), problem)


@functools.cache
def _compile(adapter: str) -> Expression:
    """One compiled function per family, as in a program: new shapes recompile or go dynamic."""
    return torch.compile(EAGER[adapter])


LAYERS.append(Layer("frozen", "", _frozen))
for _name in ADAPTERS:
    LAYERS += [
        Layer("eager", _name, functools.partial(expression, _name, EAGER[_name])),
        Layer("addmm", _name, functools.partial(expression, _name, ADDMM[_name])),
    ]
    if _name != "lokr":  # OHoRA's is the same graph twice; compiling takes longest of all
        _build = functools.partial(_compiled, _name)
        LAYERS.append(Layer("torch.compile", _name, _build, not_in=("decode", "memory")))
