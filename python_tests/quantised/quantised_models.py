"""A small net whose two layers are quantised, in each kind that runs on a CPU."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels.nn import ADAPTERS as LAYERS
from qrlora_kernels.nn import base_weight
from qrlora_kernels.nn.become import become, shallow_copy

MISSING = "{} is not installed"  # why tests of its kinds are skipped
BITSANDBYTES = ("nf4", "nf4_nested", "fp4", "bnb_int8")
TORCHAO = ("int8", "int8_groups", "int4_groups", "float8")
KINDS = (*BITSANDBYTES, *TORCHAO)
# Those whose own product is that with the dense weight; torchao's others round the sum as well.
SAME = (*BITSANDBYTES, "int8_groups", "int4_groups")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ADAPTERS: dict[str, dict[str, Any]] = {"qr": {"rank": 6}, "lora_xs": {"rank": 6}, "ohora": {}}
of_each_kind = pytest.mark.parametrize("kind", KINDS)
of_each_adapter = pytest.mark.parametrize("adapter", ADAPTERS)
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=MISSING.format(name))


def quantise(linear: nn.Linear, kind: str) -> nn.Linear:
    """A quantised layer over the weight of ``linear``."""
    return (_by_bitsandbytes if kind in BITSANDBYTES else _by_torchao)(linear, kind)


def _by_bitsandbytes(linear: nn.Linear, kind: str) -> nn.Linear:
    bnb = library("bitsandbytes")
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    shape = linear.in_features, linear.out_features, linear.bias is not None
    if kind == "bnb_int8":
        layer = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(
            linear.weight.data.clone(), has_fp16_weights=False, requires_grad=False
        )
    else:
        nested = kind == "nf4_nested"
        layer = bnb.nn.Linear4bit(*shape, quant_type=kind[:3], compress_statistics=nested)
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data.clone(), quant_type=kind[:3], compress_statistics=nested
        )
    layer = layer.to("cpu")
    layer.bias = linear.bias
    return layer.train()


def _by_torchao(linear: nn.Linear, kind: str) -> nn.Linear:
    library("torchao")
    from torchao import quantization as ao
    from torchao.quantization.granularity import PerGroup

    group = PerGroup(32)
    config: Callable[[], Any] = {
        "int8": ao.Int8WeightOnlyConfig,
        "int8_groups": lambda: ao.IntxWeightOnlyConfig(torch.int8, granularity=group),
        "int4_groups": lambda: ao.IntxWeightOnlyConfig(torch.int4, granularity=group),
        "float8": ao.Float8WeightOnlyConfig,
    }[kind]
    holder = nn.Sequential(linear)
    ao.quantize_(holder, config())
    return holder[0]


def dense(layer: nn.Module) -> Tensor:
    """The weight that ``layer`` stands for, in fp64, as its library says; not by the package."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        functional = library("bitsandbytes").functional
        return functional.dequantize_4bit(weight.data, weight.quant_state).double()
    if hasattr(layer, "state"):
        scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
        return weight.data.double() * scales.double()[:, None] / 127
    return weight.dequantize().double()


def linear(dtype: torch.dtype, n: int = 96, k: int = 64, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, dtype=dtype)


def net(kind: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    """first 64 → 96, second 96 → 64, both quantised, and a head."""
    torch.manual_seed(seed)
    first, second = nn.Linear(64, 96, dtype=dtype), nn.Linear(96, 64, dtype=dtype)
    layers = {
        "first": quantise(first, kind),
        "act": nn.Tanh(),
        "second": quantise(second, kind),
        "head": nn.Linear(64, 3, dtype=dtype),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def adapt(model: nn.Module, adapter: str = "qr", **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return qk.adapt(
            model, ["first", "second"], adapter, progress=False, **ADAPTERS[adapter] | options
        )


def move(model: nn.Module, by: float = 0.05) -> nn.Module:
    """Numbers that make a difference, where adapters train."""
    torch.manual_seed(7)
    with torch.no_grad():
        for layer in model.modules():
            for name in getattr(layer, "trainables", ()):
                p = getattr(layer, name)
                p.add_(by * torch.randn_like(p))
    return model


def x(dtype: torch.dtype = torch.bfloat16, tokens: int = 9, k: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(tokens, k, generator=generator).to(dtype)


def adapted(kind, adapter, dtype=torch.bfloat16, **options):
    layer = quantise(linear(dtype), kind)
    return layer, LAYERS[adapter].from_linear(layer, **ADAPTERS[adapter] | options)


def twin(layer, dtype):
    """The same adapter over an ordinary layer with the dense weight, in ``dtype``."""
    matrix = base_weight.quantised(layer).dense(dtype)
    plain = nn.Linear(layer.in_features, layer.out_features, dtype=dtype)
    plain.weight = nn.Parameter(matrix)
    plain.bias = nn.Parameter(layer.bias.detach().to(dtype))
    state = {n: getattr(layer, n).detach().clone() for n in (*layer.trainables, *layer.factors)}
    for name in layer.factors:
        if state[name].is_floating_point() and name not in layer.adapter.kept_fp32:
            state[name] = state[name].to(dtype)
    return become(shallow_copy(plain), LAYERS[layer.kind], layer.options, state)
